"""The daemon as a service of this user's systemd: started at boot, restarted when it fails.

The unit hardens the daemon by what needs no namespace of its own: agents run in bubblewrap, which makes
namespaces, and must find them as a login shell does.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from knode.errors import Code, KnodeError
from knode.home.layout import Home
from knode.world.real import named_disk_errors, real_world

UNIT = "knode.service"
COMMAND_TIMEOUT_S = 60.0

# deploy/knode.service is this text for a clone in the user's folder; a test holds the two together.
_TEXT = """\
[Unit]
Description=knode, this machine's node in a private mesh of AI agents

[Service]
Type=exec
ExecStart={command}
Restart=on-failure
RestartSec=10
# What another start would not mend: configuration, another daemon, no home.
RestartPreventExitStatus=2 4 5
# The daemon stops the agents itself; what is left after it is killed.
KillMode=mixed
TimeoutStopSec=30
# An agent that takes too much memory does not take the daemon with it.
OOMPolicy=continue
UMask=0077
LimitNOFILE=65536
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK

[Install]
WantedBy=default.target
"""


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What systemd knows of the service.

    `lingering` tells whether the user's services run without a login, so also after a reboot; None where
    that cannot be told.
    """

    unit: str
    installed: bool
    enabled: bool
    active: bool
    lingering: bool | None


def unit_text(command: str) -> str:
    """Return the unit that runs `command`, which is quoted as systemd wants it (systemd.service(5))."""
    return _TEXT.format(command=command)


def command_of(home: Home) -> str:
    """Return the command line that runs the daemon of `home` with this very installation."""
    program = Path(sys.executable).with_name("knode")
    words = [os.fspath(program)] if program.exists() else [sys.executable, "-m", "knode"]
    return " ".join(_quoted(word) for word in [*words, "up", "--background", "--home", os.fspath(home.path)])


def unit_file() -> Path:
    """Return where this user's unit belongs."""
    configuration = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(configuration) if configuration.startswith("/") else Path.home() / ".config"
    return folder / "systemd" / "user" / UNIT


def install(home: Home, *, start: bool) -> ServiceState:
    """Write the unit, let systemd start it at boot, and without waiting for a login.

    Doing it again changes nothing, or brings the unit up to date.

    Args:
        home: a home; the unit that is there already must be of the same.
        start: whether to start the daemon now, too.

    Raises:
        KnodeError: UNAVAILABLE where there is no systemd or it does not answer, HOME_EXISTS when the unit
            is that of another home, DISK_FULL, DISK_READ_ONLY.
    """
    _check_systemd()
    file, text = unit_file(), unit_text(command_of(home))
    with named_disk_errors(file):
        before = file.read_text() if file.exists() else ""
        if before and f"--home {_quoted(os.fspath(home.path))}\n" not in before:
            raise KnodeError(
                Code.HOME_EXISTS,
                f"{file} runs another home than {home.path}",
                "take it away first: 'knode service uninstall'",
            )
        file.parent.mkdir(parents=True, exist_ok=True)
    if text != before:
        real_world().disk.write(file, text.encode(), mode=0o644)
    _systemctl("daemon-reload")
    _systemctl("enable", *(["--now"] if start else []), UNIT)
    # May be refused; the state tells.
    _run("loginctl", "enable-linger")
    return state()


def uninstall() -> ServiceState:
    """Stop the service, take its unit away, and leave the home as it is. Nothing happens without one.

    Whether services of this user run without a login stays as it is: others may need it.

    Raises:
        KnodeError: UNAVAILABLE where there is no systemd or it does not answer, DISK_READ_ONLY.
    """
    _check_systemd()
    file = unit_file()
    if file.exists():
        _systemctl("disable", "--now", UNIT)
        with named_disk_errors(file):
            file.unlink(missing_ok=True)
        _systemctl("daemon-reload")
    return state()


def state() -> ServiceState:
    """Ask systemd.

    Raises:
        KnodeError: UNAVAILABLE where there is no systemd or it does not answer.
    """
    _check_systemd()
    linger = _run("loginctl", "show-user", getpass.getuser(), "--property=Linger", "--value")
    said = linger.stdout.strip() if linger is not None else ""
    return ServiceState(
        unit=os.fspath(unit_file()),
        installed=unit_file().exists(),
        enabled=_answers("is-enabled"),
        active=_answers("is-active"),
        lingering={"yes": True, "no": False}.get(said),
    )


def _answers(question: str) -> bool:
    asked = _run("systemctl", "--user", "--quiet", question, UNIT)
    return asked is not None and asked.returncode == 0


def _check_systemd() -> None:
    reached = _run("systemctl", "--user", "show-environment")
    if reached is None:
        raise KnodeError(
            Code.UNAVAILABLE,
            "this machine has no systemd: there is no 'systemctl'",
            "let something else run 'knode up --detach' at boot, for example cron with @reboot",
        )
    if reached.returncode != 0:
        raise KnodeError(
            Code.UNAVAILABLE,
            f"the systemd of this user does not answer ({reached.stderr.strip() or 'it said nothing'})",
            "log in as this user itself, not by su or sudo, and run it again",
        )


def _systemctl(*words: str) -> None:
    done = _run("systemctl", "--user", *words)
    if done is None or done.returncode != 0:
        said = done.stderr.strip() if done is not None else "it is not there"
        raise KnodeError(
            Code.UNAVAILABLE,
            f"'systemctl --user {' '.join(words)}' failed ({said})",
            f"journalctl --user --unit {UNIT}",
        )


def _run(*words: str) -> subprocess.CompletedProcess[str] | None:
    """Run a program of systemd; None when there is none."""
    if shutil.which(words[0]) is None:
        return None
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise KnodeError(
            Code.TIMEOUT, f"'{words[0]}' did not answer within {COMMAND_TIMEOUT_S:.0f} s", "try again"
        ) from error


def _quoted(word: str) -> str:
    """Return a word of ExecStart (systemd.service(5), "Command lines"): % and $ mean themselves."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != word or any(c.isspace() or c in "'\";" for c in word) else word
