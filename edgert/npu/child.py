"""Compile an OpenVINO IR for an NPU in this process: `python -m edgert.npu.child MODEL.xml OUT.blob KEY=VALUE …`.

Prints `compile_s SECONDS`; exit status 1 with OpenVINO's message on stderr when the model is rejected. A model can also
make the compiler abort its process, so `edgert.npu.compiler` runs this one and no other code of edgert does.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path


def main(arguments: list[str]) -> int:
    if sys.platform == "win32":  # an abort must end the process, not open a dialog that waits for somebody
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x0001 | 0x0002)
    import openvino as ov

    model_path, blob_path, *pairs = arguments
    properties = dict(pair.split("=", 1) for pair in pairs)
    try:
        core = ov.Core()
        model = core.read_model(model_path)
        start = time.perf_counter()
        compiled = core.compile_model(model, "NPU", properties)
        print(f"compile_s {time.perf_counter() - start:.3f}", flush=True)
        Path(blob_path).write_bytes(compiled.export_model().getvalue())
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
