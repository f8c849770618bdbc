"""A sidecar's socket whose owner can be stopped, so that it takes connections and never answers.

usage: python silent_sidecar.py SOCKET
"""

import sys
import time
from pathlib import Path

from sidecar.observe.telemetry import TelemetryHub
from vllm_sloguard.agent.grpc_server import serve_unix_socket
from vllm_sloguard.wire.telemetry_pb2_grpc import add_TelemetryServiceServicer_to_server

if __name__ == "__main__":
    server = serve_unix_socket(Path(sys.argv[1]), lambda s: add_TelemetryServiceServicer_to_server(TelemetryHub(), s))
    print("ready", flush=True)
    time.sleep(600)
