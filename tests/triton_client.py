"""Calls Triton over gRPC, in the environment that tests/test_triton.py describes: a program, and no module of tests.

It reads a list of calls as JSON: the `inputs` by name, in Triton's JSON form, and `cancel_after`, so many answers, or
null. All are begun in order, each on a connection of its own; it prints what came of each: `answers`, `error`, and the
moment of each call's end as its `place` among them.
"""

import base64
import json
import sys
import threading

import numpy as np
import tritonclient.grpc as grpc

TYPES = {"TYPE_STRING": "BYTES", "TYPE_BOOL": "BOOL", "TYPE_INT64": "INT64", "TYPE_FP64": "FP64", "TYPE_FP32": "FP32"}
NUMPY = {"BYTES": np.object_, "BOOL": np.bool_, "INT64": np.int64, "FP64": np.float64, "FP32": np.float32}
WAIT_S = 120


def tensor(name, kind, value):
    array = np.array(value if isinstance(value, list) else [value])
    if kind == "BYTES":
        array = np.array([one.encode() for one in array.ravel().tolist()], dtype=np.object_)
    made = grpc.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array.astype(NUMPY[kind]))
    return made


class Call:
    """One call, and what came of it."""

    def __init__(self, address, model, kinds, asked, ended):
        self.answers, self.error = [], None
        self._cancel_after, self._ended, self.over = asked.get("cancel_after"), ended, threading.Event()
        self._client = grpc.InferenceServerClient(address)
        # The header triton_grpc_error would give gRPC's codes too, but with it server 2.51 died of a signal once.
        self._client.start_stream(self._come)
        inputs = [tensor(name, kinds[name], value) for name, value in asked["inputs"].items()]
        self._client.async_stream_infer(model, inputs, enable_empty_final_response=True)

    def _come(self, result, error):
        if error is not None:
            self.error = error.message()
            self._end()
            return
        if result.get_response().parameters["triton_final_response"].bool_param:
            self._end()
            return
        image, info = (result.as_numpy(name)[0] for name in ("image", "info"))
        self.answers.append({"image": base64.b64encode(image).decode(), "info": json.loads(info)})
        if self._cancel_after == len(self.answers):
            self._end()

    def _end(self):
        if not self.over.is_set():
            self._ended.append(self)
            self.over.set()

    def close(self):
        """Close the connection; a call that is not over is cancelled by that."""
        self._client.stop_stream(cancel_requests=self._cancel_after is not None)
        self._client.close()


def main():
    address, model = sys.argv[1:]
    with grpc.InferenceServerClient(address) as client:
        config = client.get_model_config(model, as_json=True)["config"]
    kinds = {one["name"]: TYPES[one["data_type"]] for one in config["input"]}
    ended, calls = [], []
    for asked in json.load(sys.stdin):
        calls.append(Call(address, model, kinds, asked, ended))
        if "cancel_after" in asked:
            assert calls[-1].over.wait(WAIT_S)
            calls[-1].close()
    for call in calls:
        assert call.over.wait(WAIT_S)
    found = [{"answers": call.answers, "error": call.error, "place": ended.index(call)} for call in calls]
    for call in calls:
        call.close()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
