"""A server on this machine that speaks the Hub's protocol: downloads of repositories, uploads of
folders, and faults.

    with Hub({"datasets/org/name": {"README.md": b"..."}}) as hub:
        subprocess.run(..., env={"HF_ENDPOINT": hub.url})

hub.faults is a list of functions (handler, path) -> True if they answered the request in their own
way.
"""

import base64
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + 34 * "0"
TOKENS = {"hf_goodtoken": "write", "hf_readtoken": "read"}


class Hub:
    def __init__(self, repositories: dict[str, dict[str, bytes]] | None = None):
        self.repositories = (
            repositories or {}
        )  # "gpt2" for a model, "datasets/org/name" for a data set
        self.private, self.requests, self.faults, self.large = {}, [], [], {}
        self.heads = {}  # the newest commit of those that were written to; COMMIT of the others
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self})
        )
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def answer(self, status, body=b"", headers=None):
        if isinstance(body, dict | list):
            body, headers = (
                json.dumps(body).encode(),
                {"Content-Type": "application/json"} | (headers or {}),
            )
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if any(fault(self, path) for fault in list(self.hub.faults)):
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path.startswith("/api/"):
            self.api(path.removeprefix("/api/"), body, token)
        elif path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            actions = {"upload": {"href": f"{self.hub.url}/large/OID"}}
            objects = [
                o | {"actions": json.loads(json.dumps(actions).replace("OID", o["oid"]))}
                for o in wanted
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif self.command == "PUT" and path.startswith("/large/"):
            self.hub.large[path.removeprefix("/large/")] = body
            self.answer(200)
        elif "/resolve/" in path:
            name, _, rest = path[1:].partition("/resolve/")
            self.file(name, rest.partition("/")[2])
        else:
            self.answer(404, {"error": "not found"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def file(self, name, file):
        content = self.hub.repositories.get(name, {}).get(file)
        if content is None:
            code = "EntryNotFound" if name in self.hub.repositories else "RepoNotFound"
            return self.answer(404, {"error": code}, {"X-Error-Code": code})
        large = file.endswith((".parquet", ".safetensors"))  # those are known by their sha256
        digest = (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        headers = {
            "ETag": f'"{digest}"',
            "X-Repo-Commit": self.hub.heads.get(name, COMMIT),
            "Accept-Ranges": "bytes",
        }
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last) if last else len(content) - 1, len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[first : last + 1], headers)
        if self.command == "HEAD":
            headers["Content-Length"] = len(content)
        self.answer(200, content, headers)

    def api(self, path, body, token):
        if path == "whoami-v2":
            if token not in TOKENS:
                return self.answer(401, {"error": "Invalid credentials"})
            auth = {
                "type": "access_token",
                "accessToken": {"displayName": "test", "role": TOKENS[token]},
            }
            return self.answer(200, {"type": "user", "name": "someone", "orgs": [], "auth": auth})
        if path == "validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "repos/create":
            if TOKENS.get(token) != "write":
                return self.answer(403, {"error": "Forbidden: this token is read-only"})
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization") or "someone", wanted["name"])))
            self.hub.repositories.setdefault(name, {})
            self.hub.private.setdefault(
                name, wanted.get("private", wanted.get("visibility") == "private")
            )
            return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        kind, _, rest = path.partition("/")
        prefix = "datasets/" if kind == "datasets" else ""
        for verb in ("preupload", "commit", "tree", "paths-info", "revision"):
            name, found, argument = rest.partition(f"/{verb}/")
            if found and prefix + name in self.hub.repositories:
                return getattr(self, verb.replace("-", "_"))(prefix + name, argument, body)
        if prefix + rest in self.hub.repositories:
            return self.revision(prefix + rest, "main", body)
        self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def revision(self, name, revision, body):
        head = self.hub.heads.get(name, COMMIT)
        if revision not in ("main", head):
            return self.answer(
                404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
            )
        files = [{"rfilename": file} for file in self.hub.repositories[name]]
        id = name.removeprefix("datasets/")
        self.answer(
            200,
            {
                "id": id,
                "sha": head,
                "siblings": files,
                "private": self.hub.private.get(name, False),
                "tags": [],
                "downloads": 0,
            },
        )

    def entry(self, name, path):
        files = self.hub.repositories[name]
        if path in files:
            oid = hashlib.sha1(files[path]).hexdigest()
            return {"type": "file", "path": path, "size": len(files[path]), "oid": oid}
        if any(file.startswith(path + "/") for file in files):
            return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
        return None

    def tree(self, name, argument, body):
        folder = argument.partition("/")[2]
        recursive = "recursive=true" in self.path.lower()
        inside = [
            file
            for file in self.hub.repositories[name]
            if not folder or file.startswith(folder + "/")
        ]
        if folder and not inside:
            return self.answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
        depth = folder.count("/") + 1 if folder else 0
        paths = dict.fromkeys("/".join(file.split("/")[: depth + 1]) for file in inside)
        if recursive:
            paths = dict.fromkeys(
                "/".join(file.split("/")[:n])
                for file in inside
                for n in range(depth + 1, file.count("/") + 2)
            )
        self.answer(200, [self.entry(name, path) for path in paths])

    def paths_info(self, name, argument, body):
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(body)["paths"]
        else:
            paths = urllib.parse.parse_qs(body.decode())["paths"]
        entries = [
            self.entry(name, path) for path in ([paths] if isinstance(paths, str) else paths)
        ]
        self.answer(200, [entry for entry in entries if entry])

    def preupload(self, name, argument, body):
        files = json.loads(body)["files"]
        modes = {True: "lfs", False: "regular"}
        answers = [
            {
                "path": f["path"],
                "uploadMode": modes[f["path"].endswith(".safetensors")],
                "shouldIgnore": False,
                "oid": None,
            }
            for f in files
        ]
        self.answer(200, {"files": answers})

    def commit(self, name, argument, body):
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                self.hub.repositories[name][item["value"]["path"]] = base64.b64decode(
                    item["value"]["content"]
                )
            if item["key"] == "deletedFile":
                del self.hub.repositories[name][item["value"]["path"]]
            if item["key"] == "lfsFile":
                self.hub.repositories[name][item["value"]["path"]] = self.hub.large[
                    item["value"]["oid"]
                ]
        head = self.hub.heads[name] = hashlib.sha1(body).hexdigest()
        self.answer(
            200,
            {
                "commitUrl": f"{self.hub.url}/{name}/commit/{head}",
                "commitOid": head,
                "hookOutput": "",
            },
        )
