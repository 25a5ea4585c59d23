"""Opens ONNX models on the CPU, with threads that leave a busy machine to others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime


def open_session(
    path: Path, threads: int, replaced: Mapping[str, onnxruntime.OrtValue] | None = None
) -> onnxruntime.InferenceSession:
    """A session of a model file.

    Args:
        path: the ONNX file.
        threads: CPU threads.
        replaced: initializers that take the place of the file's, by name.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait by spinning starve the others of a busy machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    for name, value in (replaced or {}).items():
        options.add_initializer(name, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
