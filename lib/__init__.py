import sys

if sys.platform == "win32":
    print(
        "error: GPT124M needs Linux or macOS; on Windows it runs in WSL 2 (`wsl --install`)",
        file=sys.stderr,
    )
    raise SystemExit(2)
