"""A stand-in for the Hub's upload protocol on this machine: login, repositories, Git LFS and commits, but no Xet.

It keeps what it is sent and refuses what the Hub refuses: a wrong token, a commit to a repository that is not there, an
LFS file whose content has another sum.
"""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_stand_in"
LARGE = 10_000  # bytes from which a file goes through LFS; the Hub decides by size and by ending


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def reply(self, value=None, status=200, **headers):
        content = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def handle_any(self):
        hub, content = self.server.hub, self.body()
        path = self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if hub.hangs_up_at and hub.hangs_up_at in path:
            self.close_connection = True
            return self.connection.close()
        if hub.babbles_at and hub.babbles_at in path:
            return self.reply([])
        if path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            if hashlib.sha256(content).hexdigest() != oid:
                return self.reply({"error": "wrong sum"}, 400)
            hub.stored[oid] = content
            return self.reply()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid username or password."}, 401)
        if path == "/api/whoami-v2":
            return self.reply({"type": "user", "name": "owner", "auth": {}})
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(content)
            name = f"{wanted.get('organization') or 'owner'}/{wanted['name']}"
            if name in hub.private:
                return self.reply({"error": "You already created this model repo", "url": f"{hub.address}/{name}"}, 409)
            hub.private[name] = wanted.get("private", wanted.get("visibility") == "private")
            hub.files[name] = {}
            return self.reply({"url": f"{hub.address}/{name}", "name": name, "id": "0"})
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2]).removesuffix(".git")
        if name not in hub.private:
            return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return self.repository(hub, name, path, content)

    def repository(self, hub, name: str, path: str, content: bytes):
        if path.endswith("/tree/main"):
            return self.reply([{"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                               for path, content in hub.files[name].items()])
        if path.endswith("/preupload/main"):
            files = [{"path": file["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if file["size"] > LARGE else "regular"}
                     for file in json.loads(content)["files"]]
            return self.reply({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [{**each, "actions": {"upload": {"href": f"{hub.address}/lfs/{each['oid']}"}}}
                       for each in json.loads(content)["objects"]]
            return self.reply({"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            if hub.fails:
                return self.reply({"error": "the disk of the Hub is full"}, 507)
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[name][value["path"]] = hub.stored[value["oid"]]
                elif line["key"] == "deletedFile":
                    del hub.files[name][value["path"]]
            return self.reply({"success": True, "commitOid": "0" * 40, "hookOutput": "",
                               "commitUrl": f"{hub.address}/{name}/commit/{'0' * 40}"})
        return self.reply({"_id": "0", "id": name, "modelId": name, "private": hub.private[name], "sha": "0" * 40,
                           "siblings": [{"rfilename": path} for path in hub.files[name]], "tags": []})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any


class UploadHub:
    """`private`: {repository: bool}, `files`: {repository: {path: content}}, `requests`: what was asked, in order."""

    def __init__(self, address: str):
        self.address, self.fails = address, False
        self.hangs_up_at = self.babbles_at = None  # a part of the path of a request
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []


@contextlib.contextmanager
def upload_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = UploadHub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
