"""Values that must not render: the schema and the templates say which field, and why."""

# ruff: noqa: E501 - a table reads better in rows

from __future__ import annotations

import pytest

from tests.helm.chart import CI_VALUES, RefusedError, render

_FOLDER = CI_VALUES[0].parent
SITE, HUB, EXISTING, METRO, DSKE = (
    _FOLDER / f"{name}-values.yaml"
    for name in ("site", "hub", "site-existing-secrets", "lab-metro", "lab-dske")
)
_PAIR = 'network.grades.pairs=[{{"between":["can-site-x","uk-site-z"],"grade":"{}","hubs":[{}]}}]'
_THREE = '"hub-1","hub-2","hub-3"'
_SAME = 'hubs=[{"id":"hub-1","site":"a","operator":"x"},{"id":"hub-2","site":"a","operator":"y"}]'
_LINKS = (
    'lab.links=[{"between":["can-site-x","hub-1"]},{"between":["hub-1","uk-site-z"]},'
    '{"between":["can-site-x","hub-2"]},{"between":["hub-2","uk-site-z"]}]'
)
_TWO = _PAIR.format("dske(2,2)", '"hub-1","hub-2"')

CASES = {
    # Shares.
    "k above n": (DSKE, [_PAIR.format("dske(3,2)", _THREE)], "grade"),
    "no shares": (DSKE, [_PAIR.format("dske(0,2)", _THREE)], "grade"),
    "fewer hubs than n": (DSKE, [_PAIR.format("dske(2,3)", '"hub-1","hub-2"')], "needs 3 hubs, 2 are named"),
    "unknown hub": (DSKE, [_PAIR.format("dske(1,1)", '"hub-9"')], "hub-9 is not among the nodes"),
    "hubs of one site": (DSKE, [_SAME, _LINKS, _TWO], 'share the site "a"'),
    "hubs of one operator": (DSKE, [_SAME.replace('"a","operator":"y"', '"b","operator":"x"'), _LINKS, _TWO],
                             'share the operator "x"'),
    "a hub of no operator": (DSKE, [_SAME.replace('"a","operator":"y"', '"b"'), _LINKS, _TWO], "hub-2 names no operator"),
    "two hubs in a site": (HUB, ['hubs[1]={"id":"hub-2"}'], "a site runs at most one"),
    "hubs on one machine": (HUB, ["hubSpread.required=false"], "only a lab may put two hubs on one machine"),
    "hubs placed otherwise": (HUB, ['hubs[0].affinity={"podAntiAffinity":{}}', 'hubs[0].affinity.podAntiAffinity.x=[]'],
                              "hubSpread decides"),
    # Identity.
    "two nodes with one id": (METRO, ['nodes[1].id="can-site-x"'], 'two nodes or hubs have the id "can-site-x"'),
    "a node and a hub with one id": (DSKE, ['hubs[0].id="can-site-x"'], "two nodes or hubs have the id"),
    "a member that is remote, too": (SITE, ['network.peers[0].id="kme-a"'], "is a member of this release"),
    "two gateways with one id": (METRO, ['gateways[1].id="gw-x"'], "two gateways have the id"),
    "an id that is no id": (METRO, ['nodes[0].id="Can_X"'], "nodes.0.id"),
    "nobody": (HUB, ["hubs=[]"], "needs at least one"),
    "a name too long": (HUB, [f'hubs[0].id="{"h" * 40}"', 'fullnameOverride="a-release-with-a-long-name"'],
                        "more than 52 characters"),
    "no domain": (HUB, ['domain=""'], "domain"),
    # TLS and trust.
    "etcd without TLS": (SITE, ['etcd.external.endpoints=["http://etcd:2379"]'], "etcd.external.endpoints"),
    "a device without TLS": (SITE, ['nodes[0].links[0].device.url="http://qkd:8443"'], "url"),
    "a border without TLS": (SITE, ['nodes[0].border.peers[0].url="http://kme"'], "url"),
    "certificates from nowhere": (SITE, ['certificates.source="none"'], "certificates.source"),
    "TLS switched off in the file": (SITE, ['nodes[0].config.tls={"ca":"x"}'], "config"),
    "TLS 1.1": (SITE, ['gateways[0].config.tls.min_version="1.1"'], "min_version"),
    "one issuer for two planes": (SITE, ['certificates.issuers.gateway={"name":"node-root","kind":"ClusterIssuer"}'],
                                  "every plane has a root of its own"),
    "no issuer": (SITE, ['certificates.issuers.etcd.name=""'], "certificates.issuers.etcd.name"),
    "no issuer of borders": (SITE, ['certificates.issuers.border.name=""'], "certificates.issuers.border.name"),
    "SAEs under the node root": (EXISTING, ['certificates.saeRoot.secret="kme-b-node"'], "two roots"),
    "no SAE root": (SITE, ['certificates.saeRoot.secret=""'], "certificates.saeRoot.secret"),
    "no operator's key": (SITE, ['network.operatorPublicKey=""'], "network.operatorPublicKey"),
    "a private key instead": (SITE, ['network.operatorPublicKey="-----BEGIN PRIVATE KEY-----"'], "operatorPublicKey"),
    "unsigned homes in a site": (SITE, ['network.saes={"a":"kme-a"}'], "are for mode lab"),
    "simulated devices in a site": (SITE, ['lab.links=[{"between":["kme-a","kme-b"]}]'], "are for mode lab"),
    "open access in a site": (SITE, ['nodes[0].access="open"'], "access open is for mode lab"),
    "trust in the directory": (SITE, ['nodes[0].config.network={"trust_directory":true}'], "config"),
    # Documents.
    "a document of another domain": (EXISTING, ['domain="oslo"'], "is of domain toronto"),
    "a document without the node": (EXISTING, ['nodes[0].id="kme-c"', 'gateways[0].node="kme-c"'], "does not know kme-c"),
    "a document that is none": (EXISTING, ['network.signedDocument="hello"'], "not what keymesh network sign writes"),
    "a document that nobody publishes": (SITE, ['network.signedDocument="keymesh-signed-network/1\\n\\n{}"'],
                                         "only the release that hosts the directory"),
    "a home that is no node": (METRO, ['network.saes.sae-x-1="can-site-q"', "test.enabled=false"], "can-site-q of SAE sae-x-1"),
    # Links, gateways, borders.
    "a link with itself": (HUB, ['hubs[0].links=[{"peer":"hub-1"}]'], "linked with itself"),
    "a link with a stranger": (HUB, ['hubs[0].links=[{"peer":"kme-q"}]'], "neither in this release nor in network.peers"),
    "a lab link to nowhere": (METRO, ['lab.links[0].between=["can-site-q","can-site-r"]'], "is not in this release"),
    "the same link twice": (HUB, ['hubs[0].links=[{"peer":"uk-site-z"},{"peer":"uk-site-z"}]'], "named twice"),
    "a gateway of a remote node": (EXISTING, ['gateways[0].node="kme-a"'], "stays inside the site"),
    "a balancer without a name": (SITE, ["gateways[0].hosts=[]"], "SAEs check the name they dial"),
    "peers that cannot dial": (HUB, ['hubs[0]={"id":"hub-1","links":[{"peer":"uk-site-z"}]}'], "advertise is needed"),
    "a budget that lets nothing move": (SITE, ["gateways[0].minAvailable=3"], "lets no machine be drained"),
    "a border without a gateway": (SITE, ["gateways=[]"], "no gateway of this release speaks for it"),
    "a border peer that is not pinned": (SITE, ["nodes[0].border.peers[0].names=[]"], "pin uk-x"),
    "a border peer of our own": (SITE, ['nodes[0].border.peers[0].kmeId="kme-b"'], "is of this domain"),
    # Storage and pods.
    "shared volumes": (METRO, ['memberDefaults.persistence.accessMode="ReadWriteMany"'], "accessMode"),
    "two writers": (METRO, ["nodes[0].replicas=2"], "replicas"),
    "a proof that survives the machine": (METRO, ['proof.hostPath="/var/lib/proof"'], "proof.hostPath"),
    "a host path under restricted": (METRO, ['proof.kind="hostPath"'], "forbids host paths"),
    "pads in a Secret": (HUB, ['hubs[0].courier.volume={"secret":{"secretName":"pads"}}'], "courier.volume"),
    "pads in a ConfigMap": (HUB, ['hubs[0].courier.volume={"configMap":{"name":"pads"}}'], "courier.volume"),
    "a courier file from a stranger": (SITE, ['nodes[0].courier.imports[0].peer="hub-9"'], "with which it has no link"),
    "a courier file elsewhere": (SITE, ['nodes[0].courier.imports[0].file="../x"'], "file"),
    "root": (METRO, ["security.runAsUser=0"], "security.runAsUser"),
    "a privileged companion": (SITE, ["gateways[0].extraContainers[0].securityContext.allowPrivilegeEscalation=true"],
                               "allowPrivilegeEscalation"),
    "no memory limit": (METRO, ['nodes[0].resources={"requests":{"cpu":"1"},"limits":{"cpu":"1"}}'], "memory"),
    "two etcd members": (METRO, ["etcd.bundled.members=2"], "etcd.bundled.members"),
    "etcd nowhere": (HUB, ["etcd.external.endpoints=[]"], "etcd.external.endpoints"),
    "etcd everywhere": (HUB, ["etcd.external.cidrs=[]"], "would admit every address"),
    "traces to anywhere": (HUB, ["tracing.collectors=[]"], "would admit every address"),
    "a lab whose document nobody publishes": (METRO, ['etcd.source="external"', 'etcd.external={"endpoints":["e:2379"],"cidrs":["192.0.2.1/32"]}'],
                                               "a lab has a directory of its own"),
    "audit logs on the machine": (SITE, ['nodes[0].auditVolume={"hostPath":{"path":"/var/log"}}'], "needs security.podStandard privileged"),
    "audit logs of gateways there": (SITE, ['gateways[0].auditVolume={"hostPath":{"path":"/var/log"}}'],
                                     "gateway gw-a: auditVolume on a host path"),
    "audit logs in a ConfigMap": (SITE, ['gatewayDefaults.auditVolume={"configMap":{"name":"a"}}'], "auditVolume"),
    "a container with nothing to read": (SITE, ["nodes[0].auditVolume={}"], "extraContainers: without auditVolume"),
    "a container that reads pads": (SITE, ['nodes[0].extraContainers[0].volumeMounts=[{"name":"data","mountPath":"/data"}]'],
                                    "volumeMounts"),
    "a typo": (METRO, ["networkPolicies.enabled=true"], "networkPolicies"),
    "a test without SAEs": (SITE, ['test.master.sae=""'], "master.sae and slave.sae"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_nonsense_is_refused(case: str) -> None:
    values, sets, reason = CASES[case]
    with pytest.raises(RefusedError) as refused:
        render(values, sets=tuple(sets))
    assert reason in str(refused.value).replace("/", ".")
