"""A Ray cluster on this machine with the service on it: a program, and no module of tests (see tests/test_ray.py).

Its command line is the cluster's folder. It prints its address as a line of JSON, and then obeys the lines that it
reads, `{"deploy": NAME, "arguments": {…}}` and `{"delete": NAME}`: it answers each with `{}`. It ends with its input.
"""

import json
import socket
import sys

import ray
from ray import serve

from latentrt.runtime.ray_app import Args, app


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def main():
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _temp_dir=sys.argv[1],  # short: sockets lie in it
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )
    try:
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        print(json.dumps({"address": f"http://127.0.0.1:{port}"}), flush=True)
        for line in sys.stdin:
            told = json.loads(line)
            if "deploy" in told:
                name = told["deploy"]
                serve.run(app(Args(**told["arguments"])), name=name, route_prefix=f"/{name}")
            else:
                serve.delete(told["delete"])
            print("{}", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
