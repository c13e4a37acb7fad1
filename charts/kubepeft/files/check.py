"""`helm test`: every replica is ready, exactly one of them acts, and each counts the FineTunes. Arguments: the metrics Service, replicas, elects."""

import re
import socket
import sys
import time
import urllib.request


def fetch(address, port, path):
    host = f"[{address}]" if ":" in address else address
    with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=5) as answer:
        return answer.read().decode()


def problems(service, replicas, elects):
    addresses = sorted({entry[4][0] for entry in socket.getaddrinfo(service, 8080, type=socket.SOCK_STREAM)})
    if len(addresses) != replicas:
        yield f"{service} has {len(addresses)} replicas of {replicas}"
    leaders = 0
    for address in addresses:
        fetch(address, 8081, "/readyz")
        page = fetch(address, 8080, "/metrics")
        leaders += len(re.findall(r"^leader_election_master_status\{.*\} 1\.0$", page, re.M))
        if not re.search(r"^kubepeft_finetunes\{", page, re.M):
            yield f"{address} does not count FineTunes"
    if elects and leaders != 1:
        yield f"{leaders} replicas act"


service, replicas, elects = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "true"
deadline = time.monotonic() + 120
while True:
    try:
        found = list(problems(service, replicas, elects))
    except OSError as error:
        found = [str(error)]
    if not found:
        print(f"{replicas} replicas are ready" + (", one of them acts" if elects else ""))
        sys.exit(0)
    if time.monotonic() > deadline:
        sys.exit("; ".join(found))
    time.sleep(2)
