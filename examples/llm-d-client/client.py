"""Pod scores as llm-d's schedulers ask for them: `indexer.v1.IndexerService/GetPodScores`, answered by our service.

    python client.py --service 127.0.0.1:8101 --model smollm2-135m-instruct "The keeper counted ships. ..." [POD ...]

Nothing here is ours but the address: stubs that are made of llm-d's own indexer.proto speak the same wire.
"""

import argparse

import grpc

from serve_app.protos.indexer_pb2 import GetPodScoresRequest
from serve_app.protos.indexer_pb2_grpc import IndexerServiceStub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="text as the engine gets it, its chat template applied")
    parser.add_argument("pods", nargs="*", help="none: all that are live")
    parser.add_argument("--service", default="127.0.0.1:8101", help="gRPC address of `kvcache serve-scores`")
    parser.add_argument("--model", default="", help="as it is called there")
    options = parser.parse_args()
    asked = GetPodScoresRequest(prompt=options.prompt, model_name=options.model, pod_identifiers=options.pods)
    with grpc.insecure_channel(options.service) as channel:
        answer = IndexerServiceStub(channel).GetPodScores(asked, timeout=5)
    for one in sorted(answer.scores, key=lambda one: -one.score):
        rank = f"  rank {one.data_parallel_rank}" if one.HasField("data_parallel_rank") else ""
        print(f"{one.pod}  {one.score:g}{rank}")


if __name__ == "__main__":
    main()
