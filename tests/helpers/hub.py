"""A model hub on the loopback address: it answers the Hugging Face client's requests from folders."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def commit_of(folder):
    total = hashlib.sha1()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


@contextmanager
def loopback_hub(models):
    """Serve folders by hub id. Yield the address and the list of fetched files.

    Args:
        models: hub id -> folder. A test may change the mapping while the hub runs.
    """
    fetched = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body):
            path = self.path.partition("?")[0]
            for name, folder in models.items():
                commit, files = commit_of(folder), {p.name: p for p in folder.iterdir()}
                if path.startswith(f"/api/models/{name}/tree/"):
                    rows = [
                        {"type": "file", "path": n, "size": p.stat().st_size, "oid": sha(p)} for n, p in files.items()
                    ]
                    return self.send(json.dumps(rows).encode(), {"Content-Type": "application/json"}, body)
                if path.startswith(f"/api/models/{name}"):
                    about = {"id": name, "modelId": name, "sha": commit, "siblings": [{"rfilename": n} for n in files]}
                    return self.send(json.dumps(about).encode(), {"Content-Type": "application/json"}, body)
                wanted = Path(path).name
                if path.startswith(f"/{name}/resolve/") and wanted in files:
                    if body:
                        fetched.append(f"{name}/{wanted}")
                    headers = {"ETag": f'"{sha(files[wanted])}"', "X-Repo-Commit": commit}
                    return self.send(files[wanted].read_bytes(), headers, body)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        def send(self, data, headers, body):
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def do_GET(self):
            self.answer(True)

        def do_HEAD(self):
            self.answer(False)

        def log_message(self, *_):
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    finally:
        server.shutdown()
        server.server_close()


def sha(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()
