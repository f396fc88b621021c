"""llama-cpp-python's own server (OpenAI's completions) with a checkpoint's weights in llama.cpp's format.

    python -m benchmarks.peers.llama_server --model CHECKPOINT --file OUT.gguf --type Q4_0 --threads 2 --port 8001

Runs in an environment with llama-cpp-python's server and gguf. Llama shapes only.
"""

from __future__ import annotations

import uvicorn
from llama_cpp.server.app import create_app
from llama_cpp.server.settings import ModelSettings, ServerSettings

from benchmarks.peers.llama_engine import arguments, prepare

CONTEXT = 512


def main() -> None:
    parser = arguments()
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    prepare(options.model, options.file, options.type)
    # Requests wait for each other instead of breaking each other off.
    settings = ServerSettings(interrupt_requests=False)
    model = ModelSettings(
        model=str(options.file),
        model_alias="lm",
        n_ctx=CONTEXT,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        verbose=False,
    )
    uvicorn.run(create_app(server_settings=settings, model_settings=[model]), port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
