"""PredictorService: how long answers will be, without allocating anything."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from odma_service.errors import InvalidError
from odma_service.learning import Foreseen
from odma_service.rpc.v1 import predictor_service_pb2 as pb
from odma_service.rpc.v1.predictor_service_pb2_grpc import PredictorServiceServicer
from odma_service.service.pools.registry import Registry
from odma_service.service.rpc.names import name_from
from odma_service.service.rpc.reports import BASES
from odma_service.service.rpc.statuses import reports_errors
from odma_service.values import Allocate

MOST_PROMPTS = 1_024
MOST_TEXT_BYTES = 16 * 1024
MOST_PROMPT_TOKENS = 2**28
MOST_CLASS_BYTES = 32


class PredictorService(PredictorServiceServicer):
    """Predicts as an allocate would be predicted for. Texts are neither logged nor stored."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    @reports_errors
    def Predict(
        self, request: pb.PredictRequest, context: grpc.ServicerContext
    ) -> pb.PredictResponse:
        name = name_from(request.pool_name, "pool_name")
        ops = list(_ops_from(request))
        with self._registry.viewed(name) as view:
            question = view.learner.question(ops)
        answers = question.answers()  # away from the lock: a model takes its time
        model = question.predictor
        return pb.PredictResponse(
            predictions=[_prediction_to(foreseen) for foreseen in answers if foreseen],
            model_version=model.version if model else "",
        )


def _ops_from(request: pb.PredictRequest) -> Iterator[Allocate]:
    if not 1 <= len(request.prompts) <= MOST_PROMPTS:
        raise InvalidError("prompts", f"1 to {MOST_PROMPTS:,}, not {len(request.prompts):,}")
    for i, prompt in enumerate(request.prompts):
        if len(prompt.text.encode()) > MOST_TEXT_BYTES:
            raise InvalidError(f"prompts[{i}].text", f"up to {MOST_TEXT_BYTES:,} bytes of UTF-8")
        if not 1 <= prompt.prompt_tokens <= MOST_PROMPT_TOKENS:
            raise InvalidError(f"prompts[{i}].prompt_tokens", "1 to 2^28")
        if prompt.generated_tokens > MOST_PROMPT_TOKENS:
            raise InvalidError(f"prompts[{i}].generated_tokens", "at most 2^28")
        if len(prompt.request_class.encode()) > MOST_CLASS_BYTES:
            raise InvalidError(f"prompts[{i}].request_class", f"up to {MOST_CLASS_BYTES} bytes")
        yield Allocate(
            "",
            prompt.prompt_tokens,
            prompt.generated_tokens,
            request_class=prompt.request_class,
            text=prompt.text if prompt.HasField("text") else None,
        )


def _prediction_to(foreseen: Foreseen) -> pb.Prediction:
    return pb.Prediction(
        output_quantiles_tokens=foreseen.quantiles or (),
        basis=BASES[foreseen.source],
        raw_output_quantiles_tokens=foreseen.raw or (),
        completions=foreseen.completions,
    )
