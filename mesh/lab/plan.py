"""From a network file to files and commands: certificates, configurations, ports, ``lab.json``.

Writes everything a lab needs before anything starts, so that every process is started,
and restarted, by the same command. What belongs to one domain is in ``mesh.lab.plan_domain``.
Must not start or contact anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mesh.lab.ground import free_ports
from mesh.lab.networks import Lab, Network
from mesh.lab.plan_domain import DomainPlanner, EtcdMember, ports_needed
from mesh.lab.processes import Process
from mesh.lab.state import DomainFolder, LabDirectory


@dataclass(frozen=True, slots=True)
class DomainPlan:
    """One domain of a lab.

    Attributes:
        network: what is planned.
        folder: where its certificates and its document are.
        members: etcd members.
        etcd: the domain's entry on etcd in ``lab.json``.
    """

    network: Network
    folder: DomainFolder
    members: tuple[EtcdMember, ...]
    etcd: dict[str, Any]


@dataclass(slots=True)
class LabPlan:
    """All that is needed to start a lab.

    Attributes:
        directory: where its files are.
        processes: in the order of starting; groups of one kind start together.
        lab: the content of ``lab.json``, pids still 0.
    """

    directory: LabDirectory
    domains: list[DomainPlan] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    lab: dict[str, Any] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[Process]:
        """The processes of some kinds."""
        return [process for process in self.processes if process.kind in kinds]


class Planner:
    """Writes one lab's files.

    Args:
        lab: what to plan.
        directory: where.
    """

    def __init__(self, lab: Lab, directory: LabDirectory) -> None:
        self._dir = directory
        self._plan = LabPlan(directory)
        self._plan.lab = {"version": 1, "network": lab.name, "domains": []}
        self._plan.lab |= {
            section: [] for section in ("nodes", "hubs", "gateways", "saes", "devices", "relays")
        }
        ports = free_ports(sum(ports_needed(network) for network in lab.domains))
        is_only = len(lab.domains) == 1
        self._domains = [
            DomainPlanner(
                network,
                directory,
                directory.domain_folder(network.domain, is_only=is_only),
                ports=ports,
                etcd_prefix="" if is_only else f"{network.domain}-",
                add=self._add,
                lab=self._plan.lab,
            )
            for network in lab.domains
        ]

    def _add(self, kind: str, process_id: str, argv: list[str]) -> None:
        log = str(self._dir.log_of(process_id))
        self._plan.processes.append(Process(id=process_id, kind=kind, argv=argv, log=log))

    def write(self) -> LabPlan:
        """Write all files; return what to start."""
        for folder in (self._dir.audit, self._dir.data):
            folder.mkdir(exist_ok=True, mode=0o700)
        if self._dir.proofs is not None:
            self._dir.proofs.mkdir(mode=0o700)
        borders = {kme_id: place for domain in self._domains for kme_id, place in domain.borders().items()}
        for domain in self._domains:
            etcd = domain.write(borders)
            self._plan.domains.append(DomainPlan(domain.network, domain.folder, domain.members, etcd))
        lab = self._plan.lab
        lab |= {name: lab["domains"][0][name] for name in ("ca", "etcd", "tool")}
        return self._plan
