"""What Ray's HAProxy lacks for a service that strangers reach: time limits, loopback, a secret, errors in one shape.

Ray writes HAProxy's configuration itself and leaves one place to come between, the path of the binary. A script there
(`write_wrapper`) runs this file, which completes the configuration (`hardened`), and then becomes the real HAProxy. If
Ray ever writes something else than what is looked for, HAProxy does not start, rather than run without.

Runs by itself before every start of HAProxy: the standard library only, and nothing of Fettle.
"""

import json
import os
import shlex
import stat
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

# A request's line and headers must be there by then; bodies have a limit of their own, at the router.
HEADER_TIMEOUT_S = 15
# A client that neither sends what it owes nor takes what lies ready is given up. One that waits for a reply is neither.
SILENT_CLIENT_S = 60
# Carries the secret from HAProxy to the router. Whatever a client sends under this name is replaced.
SECRET_HEADER = "x-fettle-proxy"
MARK = "# completed by Fettle"
ERRORS = {
    400: (
        "the request is not valid HTTP, or its headers are too many or too long",
        "invalid_request_error",
        "bad_http",
    ),
    408: (
        f"the request was not complete within {HEADER_TIMEOUT_S} s; send its headers at once",
        "invalid_request_error",
        "timeout",
    ),
    502: ("the router ended before it answered; send the request again", "unavailable_error", "unavailable"),
    503: ("no router takes requests at the moment; try again in a moment", "unavailable_error", "unavailable"),
    504: ("the router did not answer in time; send the request again", "unavailable_error", "unavailable"),
}

RULES = (
    # Ray writes the id into logs and replies, and gives one where there is none.
    "http-request del-header x-request-id unless { req.hdr(x-request-id) -m reg ^[A-Za-z0-9._:@/+=-]{1,128}$ }",
    # Ray reads these; Fettle uses none of them. The last one would have a request go on when its client has left.
    *(
        f"http-request del-header {name}"
        for name in ("serve_multiplexed_model_id", "x-session-id", "x-request-disconnect-disabled")
    ),
    # Ray fails on what is no UTF-8 there.
    "http-request deny status 400 if { req.hdr(x-request-timeout-seconds) -m reg [^[:print:]] }",
    # A HAProxy that was replaced tells clients in the headers of what it still answers to ask elsewhere next. Those of
    # a stream were sent long before, and the routers that it knows may all be gone when the stream ends.
    "http-response set-header connection close if { res.hdr(content-type) -m beg text/event-stream }",
)


@dataclass(frozen=True)
class Front:
    """`secret_file` holds what the routers ask for. `private`: statistics and metrics listen on loopback only."""

    secret_file: str
    private: bool = True
    header_timeout_s: int = HEADER_TIMEOUT_S
    silent_client_s: int = SILENT_CLIENT_S


def hardened(config: str, front: Front, secret: str) -> str:
    """The configuration that Ray wrote, completed; as it is where that was done before.

    Raises:
        ValueError: it is not as this version of Fettle knows it; the message says what is missing.
    """
    if config.startswith(MARK):
        return config
    lines: list[str] = [MARK]
    section, found = "", set()
    for line in config.splitlines():
        stripped = line.strip()
        if line and not line[0].isspace() and not line.startswith("#"):
            section = stripped
        if section == "defaults" and stripped.startswith(("timeout client ", "timeout http-request ", "errorfile ")):
            continue
        if front.private and section in ("frontend prometheus", "listen stats") and stripped.startswith("bind "):
            line = f"    bind 127.0.0.1:{stripped.rpartition(':')[2]}"
            found.add(section)
        lines.append(line)
        if section == "defaults" and stripped == "mode http":
            lines += _defaults(front)
            found.add(section)
        if section == "frontend http_frontend" and stripped.startswith("bind "):
            lines += [f"    {rule}" for rule in (*RULES, f"http-request set-header {SECRET_HEADER} {secret}")]
            found.add(section)
    wanted = {"defaults", "frontend http_frontend"}
    if front.private:
        wanted |= {"frontend prometheus", "listen stats"}
    if missing := sorted(wanted - found):
        raise ValueError(
            f"Ray's HAProxy configuration has no {' and no '.join(missing)} as this version of Fettle knows"
        )
    return "\n".join(lines) + "\n"


def _defaults(front: Front) -> list[str]:
    lines = [f"timeout http-request {front.header_timeout_s}s", f"timeout client {front.silent_client_s}s"]
    for status, (message, kind, code) in ERRORS.items():
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
        again = " hdr retry-after 1" if status == 503 else ""
        lines.append(f"http-error status {status} content-type application/json string '{body}'{again}")
    return [f"    {line}" for line in lines]


def write_wrapper(path: Path, front: Front, binary: Path) -> None:
    """A script that stands for the HAProxy at `binary` and completes its configuration first."""
    settings = json.dumps(asdict(front))
    completing = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), settings]
    path.write_text(
        f'#!/bin/sh\n{shlex.join(completing)} "$@" && exec {shlex.quote(str(binary))} "$@"\n', encoding="utf-8"
    )
    path.chmod(0o700)


def complete(path: Path, front: Front) -> None:
    """Complete the configuration in a file, which from then on only its owner can read.

    Raises:
        ValueError: see `hardened`; or the secret is none that fits into a header.
        OSError: a file cannot be read or written.
    """
    secret = Path(front.secret_file).read_text(encoding="ascii").strip()
    if not secret.isalnum():
        raise ValueError(f"{front.secret_file} must hold one word of letters and digits")
    config = hardened(path.read_text(encoding="utf-8"), front, secret)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    path.write_text(config, encoding="utf-8")


def main() -> None:
    """`haproxy.py SETTINGS [arguments of HAProxy]`."""
    front, arguments = Front(**json.loads(sys.argv[1])), sys.argv[2:]
    if "-f" not in arguments:
        return
    path = Path(arguments[arguments.index("-f") + 1])
    try:
        complete(path, front)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"fettle: {path}: {error}{os.linesep}")
        sys.exit(1)


if __name__ == "__main__":
    main()
