"""A stand-in for the Hugging Face hub: as much of its HTTP interface as uploads and downloads use.

``python hub_server.py FOLDER`` prints its address. Repositories are folders of FOLDER.
"""

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

_COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Serves ``server.folder``; commits are all called ``0...0``."""

    protocol_version = "HTTP/1.1"

    def _answer(self, content, code=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self):
        self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def _files(self, repo):
        folder = self.server.folder / repo
        return sorted(path for path in folder.iterdir()) if folder.is_dir() else None

    def do_GET(self):
        parts = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            files = self._files(repo)
            if files is None:
                return self._missing()
            if parts[4:5] == ["tree"]:
                entries = [
                    dict(type="file", path=p.name, size=p.stat().st_size, oid=_digest(p))
                    for p in files
                ]
                return self._answer(entries)
            siblings = [{"rfilename": path.name} for path in files]
            return self._answer(dict(id=repo, modelId=repo, sha=_COMMIT, siblings=siblings))
        path = self.server.folder / "/".join(parts[:2]) / parts[-1]
        if parts[2:3] != ["resolve"] or not path.is_file():
            return self._missing()
        headers = dict(ETag=f'"{_digest(path)}"', X_Repo_Commit=_COMMIT)
        return self._answer(path.read_bytes(), **headers)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            (self.server.folder / repo).mkdir(parents=True, exist_ok=True)
            return self._answer(dict(url=f"http://{self.headers['Host']}/{repo}", id="1"))
        if parts[:2] == ["api", "validate-yaml"]:
            return self._answer(dict(errors=[], warnings=[]))
        if parts[:2] != ["api", "models"]:
            return self._missing()
        repo, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            files = [
                dict(path=file["path"], uploadMode="regular", shouldIgnore=False)
                for file in json.loads(body)["files"]
            ]
            return self._answer(dict(files=files))
        if action == "commit":
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    (self.server.folder / repo / entry["value"]["path"]).write_bytes(content)
            url = f"http://{self.headers['Host']}/{repo}/commit/{_COMMIT}"
            return self._answer(dict(commitUrl=url, commitOid=_COMMIT, success=True))
        return self._missing()

    def log_message(self, *args):
        pass


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:40]


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = Path(sys.argv[1])
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
