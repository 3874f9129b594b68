"""Two hosts on one machine: network namespaces with names and addresses of their own, an ssh server in each."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NAMESPACE_FILES = Path("/etc/netns")  # what lies in NAME/ stands in the place of /etc's inside a namespace
NEEDED = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare")


def missing_programs() -> list[str]:
    return [program for program in NEEDED if shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin") is None]


@dataclass(frozen=True)
class Host:
    """One host; its namespace is named after it, behind a prefix."""

    name: str
    address: str

    @property
    def namespace(self) -> str:
        return f"cl-{self.name}"

    @property
    def link(self) -> str:
        return f"cl-{self.name}"

    def inside(self, command: Sequence[str]) -> list[str]:
        """`command` as it is to be started to run on this host, under its name."""
        named = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", named, self.name, *command]

    def plug(self, *, connected: bool) -> None:
        """Connect the host's network cable, or pull it out."""
        _do("ip", "-n", self.namespace, "link", "set", self.link, "up" if connected else "down")


class Network:
    """Two hosts, joined by a cable."""

    def __init__(self, folder: Path, names: tuple[str, str] = ("north", "south")) -> None:
        self.hosts = [Host(name, f"10.231.7.{number}") for number, name in enumerate(names, start=1)]
        self._folder = folder
        self._servers: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        key = self._folder / "key"
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        first, second = self.hosts
        for host in self.hosts:
            _do("ip", "netns", "add", host.namespace)
            self._write_etc(host, key)
        _do(
            *("ip", "link", "add", first.link, "netns", first.namespace, "type", "veth"),
            *("peer", "name", second.link, "netns", second.namespace),
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        for host in self.hosts:
            _do("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.link)
            _do("ip", "-n", host.namespace, "link", "set", "lo", "up")
            host.plug(connected=True)
            command = host.inside(["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/sshd_config"])
            with (self._folder / f"sshd-{host.name}.log").open("wb") as log:
                self._servers.append(subprocess.Popen(command, stdout=log, stderr=log))
        for host in self.hosts:
            self._wait_for(host)

    def _write_etc(self, host: Host, key: Path) -> None:
        etc = NAMESPACE_FILES / host.namespace
        (etc / "ssh").mkdir(parents=True, exist_ok=True)
        names = "".join(f"{other.address} {other.name}\n" for other in self.hosts)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (etc / "ssh" / "ssh_config").write_text(
            f"Host *\n IdentityFile {key}\n IdentitiesOnly yes\n BatchMode yes\n StrictHostKeyChecking no\n"
            " UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
        )
        (etc / "ssh" / "sshd_config").write_text(
            f"HostKey {key}\nAuthorizedKeysFile {key}.pub\nPermitRootLogin prohibit-password\nStrictModes no\n"
            f"PidFile none\nUsePAM no\nListenAddress {host.address}\n"
        )

    def _wait_for(self, host: Host) -> None:
        for _ in range(50):
            done = subprocess.run(
                self.hosts[0].inside(["ssh", host.name, "uname", "-n"]), capture_output=True, text=True
            )
            if done.stdout.strip() == host.name:
                return
            time.sleep(0.2)
        raise AssertionError(f"no ssh to {host.name}: {done.stderr}")

    def stop(self) -> None:
        for host in self.hosts:
            found = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True)
            for pid in found.stdout.split():
                subprocess.run(["kill", "-9", pid], check=False)
        for server in self._servers:
            server.wait(timeout=10)
        for host in self.hosts:
            subprocess.run(["ip", "netns", "delete", host.namespace], check=False)
            shutil.rmtree(NAMESPACE_FILES / host.namespace, ignore_errors=True)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
