"""What does a worker pay to verify a signed bundle? Our reader of `model.sig` and `model-signing`, side by side.

Each way runs in a new process, as a worker does when it starts: importing what it needs, the first verification,
and the mean of those after it. The bundle is a small model with everything that `models sign` lays beside it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from mlops_course.environment import load_settings
from mlops_course.experiments import TrainingConfig, train
from mlops_course.project import flight_delay
from mlops_course.security.signing_key import verifying_key_file
from mlops_course.security.vouching import vouch
from mlops_course.serving.packaging import Origin, write_bundle

WAYS = {
    "ours": """
from mlops_course.security.signing import signature_verifier
from mlops_course.serving.bundle import open_bundle
verify = signature_verifier(key)
work = lambda: open_bundle(folder, verify)""",
    "model-signing": """
from model_signing import verifying
from mlops_course.serving.bundle import open_bundle
def work():
    verifying.Config().use_elliptic_key_verifier(public_key=key).verify(folder, folder / "model.sig")
    open_bundle(folder)""",
    "no signature": """
from mlops_course.serving.bundle import open_bundle
work = lambda: open_bundle(folder)""",
}
PROGRAM = """
import json, sys, time
from pathlib import Path
folder, key = map(Path, sys.argv[1:])
begin = time.perf_counter()
{way}
ready = time.perf_counter()
work()
first = time.perf_counter()
for _ in range(50):
    work()
after = (time.perf_counter() - first) / 50
status = Path("/proc/self/status")
lines = status.read_text().splitlines() if status.exists() else []
peak = [line.split()[1] for line in lines if line.startswith("VmHWM")] or [0]
milliseconds = {{"import, ms": ready - begin, "first, ms": first - ready, "then, ms": after}}
found = {{name: round(1000 * seconds, 2) for name, seconds in milliseconds.items()}}
print(json.dumps({{**found, "memory, MB": int(peak[0]) // 1024}}))
"""


def main() -> None:
    """Measure each way, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    as_json, table = parser.parse_args().json, []
    with tempfile.TemporaryDirectory() as place:
        settings = load_settings(home=Path(place) / "workspace", trust=Path(place) / "trust").prepare()
        draw = np.random.default_rng(2013)
        rows = pd.DataFrame({name: draw.choice(["AA", "UA"], 500) for name in flight_delay.categorical})
        rows["wind_speed"] = (draw.random(500) * 40).astype(np.float32)
        rows["label"] = (rows["wind_speed"] > 25).astype(float)
        model = train(rows, flight_delay, TrainingConfig(iterations=50, leaf_samples=50))
        origin = Origin(run_id="0f0f", data={}, first="2013-01", last="2013-02")
        folder = write_bundle(settings, flight_delay, model, rows, "flight-delay@1", origin)
        vouch(settings, folder)
        for name, way in WAYS.items():
            command = [sys.executable, "-c", PROGRAM.format(way=way), folder, verifying_key_file(settings)]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
            table.append({"way": name, **json.loads(done.stdout)})
    print(json.dumps(table, indent=1) if as_json else pd.DataFrame(table).to_string(index=False))


if __name__ == "__main__":
    main()
