"""Runs openpi's own client against a server: `python openpi_black_box.py PORT`, in its own venv."""

import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

port = int(sys.argv[1])
observation = {
    "observation/image": np.zeros((96, 96, 3), np.uint8),
    "observation/wrist_image": np.zeros((96, 96, 3), np.uint8),
    "observation/state": np.zeros(14, np.float32),
    "prompt": "put the red cube in the bin",
}
policy = WebsocketClientPolicy("127.0.0.1", port)
print("metadata", sorted(policy.get_server_metadata()["observation"]))
answer = policy.infer(observation)
print("actions", answer["actions"].shape, answer["actions"].dtype, "forwards", answer["forwards"])
broker = ActionChunkBroker(policy, action_horizon=4)
steps = [broker.infer(observation)["actions"] for _ in range(6)]
whole = [answer["actions"][index % 4] for index in range(6)]
print("broker", all(np.array_equal(step, part) for step, part in zip(steps, whole, strict=True)))
try:
    policy.infer({"prompt": "lift"})
except RuntimeError as error:
    print("error", str(error).splitlines()[-1])
again = WebsocketClientPolicy("127.0.0.1", port).infer(observation)
print("again", np.array_equal(again["actions"], answer["actions"]))
