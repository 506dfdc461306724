"""A program that tests whether llama.cpp can load a GGUF file and read a token. A failed assertion in llama.cpp aborts
the process, so the test runs in a process of its own.

python -I -S trial.py FOLDER-OF-LLAMA_CPP FOLDER-OF-TYPING_EXTENSIONS FILE...
"""

import sys
import types

package, library, *paths = sys.argv[1:]
sys.path.append(library)
sys.modules["llama_cpp"] = module = types.ModuleType(
    "llama_cpp"
)  # skips the package's own __init__, which takes half a second
module.__path__ = [package]

from llama_cpp import llama_cpp as native  # noqa: E402

params = native.llama_model_default_params()
params.use_extra_bufts = False  # do not repack: map the file's pages, which the main process needs next
files = (native.ctypes.c_char_p * len(paths))(*(path.encode() for path in paths))
model = native.llama_model_load_from_splits(files, len(paths), params)
settings = native.llama_context_default_params()
settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
settings.n_threads = 1
context = native.llama_init_from_model(model, settings) if model else None
if context:
    token = (native.llama_token * 1)(0)
    native.llama_decode(context, native.llama_batch_get_one(token, 1))
