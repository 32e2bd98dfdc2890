"""A Ray cluster on this machine with the service on it: a program, and no module of tests (see tests/test_ray.py).

It reads the arguments of the application as JSON, and its folder, from the command line. It prints a line of JSON when
it serves, obeys the lines that it reads (`delete` ends the application, and is answered when it has ended), and ends
with its input.
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
    arguments, folder = json.loads(sys.argv[1]), sys.argv[2]
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _temp_dir=folder,  # short: sockets lie in it
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )
    try:
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(Args(**arguments)))
        print(json.dumps({"address": f"http://127.0.0.1:{port}"}), flush=True)
        for line in sys.stdin:
            if line.strip() == "delete":
                serve.delete("default")
                print("{}", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
