"""EchoX: a training system for speech-to-speech language models (arXiv 2509.09174).

The library imports no Ray: everything that schedules processes lives in `launch`.
"""

__version__ = "0.1.0"
