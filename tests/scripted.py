"""A server with the form of OpenAI's chat completions, whose answers a test gives in advance."""

import contextlib
import http.server
import json
import threading


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers with what the server's list of answers gives next."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked))
        self.server.keys.append(self.headers["Authorization"])
        code, body = self.server.answers.pop(0)
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *about):
        pass


@contextlib.contextmanager
def chat_server(monkeypatch):
    """A server with `asked` [(path, body)], `keys`, `answers` [(code, body)] and `url`."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    found = http.server.HTTPServer(("127.0.0.1", 0), Scripted)
    found.asked, found.answers, found.keys = [], [], []
    found.url = f"http://127.0.0.1:{found.server_port}"
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


def said(text):
    return 200, {"choices": [{"message": {"content": text}}]}
