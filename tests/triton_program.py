"""Asks a service as a program does that uses Triton's client; run by its own Python, which knows nothing of us."""

import json
import sys

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, triton_to_np_dtype


def main() -> None:
    address, name = sys.argv[1:]
    records = json.load(sys.stdin)
    client = InferenceServerClient(address)
    model = client.get_model_metadata(name)
    inputs = []
    for each in model["inputs"]:
        values = [record[each["name"]] for record in records]
        inputs.append(InferInput(each["name"], [len(records)], each["datatype"]))
        data = np.array(values, dtype=triton_to_np_dtype(each["datatype"]))
        inputs[-1].set_data_from_numpy(data, binary_data=False)
    outputs = [InferRequestedOutput(each["name"], binary_data=False) for each in model["outputs"]]
    found = client.infer(name, inputs, outputs=outputs)
    try:
        client.infer("another", inputs, outputs=outputs)
        refused = ""
    except InferenceServerException as error:
        refused = error.message()[: len("there is no model")]
    told = {
        "live": client.is_server_live(), "ready": client.is_server_ready(), "model ready": client.is_model_ready(name),
        "inputs": len(inputs), "score": found.as_numpy("score").tolist(), "warned": found.as_numpy("warned").tolist(),
        "refused": refused,
    }  # fmt: skip
    json.dump(told, sys.stdout)


main()
