/* client.cc - retries, and statuses read. */
#include "client.h"

#include <algorithm>
#include <random>
#include <thread>
#include <utility>

#include "status.pb.h"

namespace odma {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

static constexpr milliseconds FIRST_PAUSE{20}, LONGEST_PAUSE{500};

static constexpr int MOST_NUMBERS = 16; /* of one message */

static const char *const CODES[] = {
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
};

/* CANCELLED comes from a service that shuts down. */
static bool no_answer(grpc::StatusCode code) {
    return code == grpc::UNAVAILABLE || code == grpc::DEADLINE_EXCEEDED || code == grpc::CANCELLED;
}

/* Read `detail` into `message` if it is one of that type. */
static bool unpack(const google::protobuf::Any &detail, const std::string &type,
                   google::protobuf::Message *message) {
    return detail.type_url() == "type.googleapis.com/" + type &&
           message->ParseFromString(detail.value());
}

Error::Error(const grpc::Status &status)
    : std::runtime_error(std::string(CODES[status.error_code()]) + ": " + status.error_message()),
      code(status.error_code()) {
    details::Status parsed;
    if (!parsed.ParseFromString(status.error_details())) return;
    for (const google::protobuf::Any &detail : parsed.details()) {
        details::ErrorInfo info;
        details::BadRequest bad;
        details::RetryInfo retry;
        v1::Refusal why;
        if (unpack(detail, "google.rpc.ErrorInfo", &info)) {
            reason = info.reason();
            metadata = {info.metadata().begin(), info.metadata().end()};
        } else if (unpack(detail, "google.rpc.BadRequest", &bad)) {
            if (bad.field_violations_size() > 0) field = bad.field_violations(0).field();
        } else if (unpack(detail, "google.rpc.RetryInfo", &retry)) {
            const google::protobuf::Duration &delay = retry.retry_delay();
            retry_after = milliseconds(delay.seconds() * 1000 + delay.nanos() / 1'000'000);
        } else if (unpack(detail, "odma.v1.Refusal", &why)) {
            refusal = why;
        }
    }
}

bool Error::perhaps_done() const {
    return no_answer(code) || code == grpc::INTERNAL || code == grpc::UNKNOWN;
}

bool Error::not_begun() const {
    return reason == "BUSY" || reason == "CALLER_LIMIT" || reason == "STREAM_LIMIT";
}

static std::string random_bytes(size_t count) {
    std::random_device random;
    std::string bytes(count, '\0');
    for (char &byte : bytes) byte = static_cast<char>(random());
    return bytes;
}

Client::Client(std::string target, Options options)
    : target_(std::move(target)), options_(std::move(options)), instance_(random_bytes(16)) {
    connect();
}

/* A new connection each time: a broken one may take minutes to be noticed. */
void Client::connect() {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
    channel_ = grpc::CreateCustomChannel(target_, options_.credentials, arguments);
}

void Client::authorize(grpc::ClientContext *context) const {
    if (!options_.token.empty()) context->AddMetadata("authorization", "Bearer " + options_.token);
}

void Client::until_answered(const std::function<grpc::Status(grpc::ClientContext *)> &attempt) {
    const auto give_up = steady_clock::now() + options_.retry;
    for (milliseconds pause = FIRST_PAUSE;; pause = std::min(2 * pause, LONGEST_PAUSE)) {
        grpc::ClientContext context;
        context.set_deadline(std::chrono::system_clock::now() + options_.timeout);
        authorize(&context);
        const grpc::Status status = attempt(&context);
        if (status.ok()) return;
        const Error error(status);
        const bool again = no_answer(error.code) || error.not_begun();
        const milliseconds wait = std::max(pause, error.retry_after);
        if (!again || steady_clock::now() + wait > give_up) throw error;
        std::this_thread::sleep_for(wait);
        connect();
    }
}

Pool Client::open_pool(v1::OpenPoolRequest request) {
    v1::OpenPoolResponse opened;
    request.set_instance(instance_);
    request.set_seen("");
    for (;;) {
        try {
            until_answered([&](grpc::ClientContext *context) {
                request.set_attempt(++attempts_);
                return v1::MemoryService::Stub(channel_).OpenPool(context, request, &opened);
            });
            return Pool(*this, std::move(opened));
        } catch (const Error &error) { /* the pool was not as seen, or an answer was lost */
            if (error.reason != "OPEN_STALE") throw;
            const auto seen = error.metadata.find("seen");
            request.set_seen(seen == error.metadata.end() ? "" : seen->second);
        }
    }
}

void Client::close_pool(const v1::PoolRef &pool) {
    v1::ClosePoolRequest request;
    *request.mutable_pool() = pool;
    request.set_by_operator(true);
    call(&v1::MemoryService::Stub::ClosePool, request);
}

void Client::forget_pool(const v1::PoolRef &pool) {
    v1::ForgetPoolRequest request;
    *request.mutable_pool() = pool;
    call(&v1::PoolService::Stub::ForgetPool, request);
}

v1::Policy Client::set_policy(const v1::PoolRef &pool, const v1::PolicyChange &change,
                              uint32_t expected_version) {
    v1::SetPolicyRequest request;
    *request.mutable_pool() = pool;
    *request.mutable_policy() = change;
    request.set_expected_version(expected_version);
    return call(&v1::MemoryService::Stub::SetPolicy, request).policy();
}

v1::RecalibrateResponse Client::recalibrate(const v1::PoolRef &pool, uint32_t expected_version,
                                            bool dry_run) {
    v1::RecalibrateRequest request;
    *request.mutable_pool() = pool;
    request.set_expected_version(expected_version);
    request.set_dry_run(dry_run);
    return call(&v1::MemoryService::Stub::Recalibrate, request);
}

Stream::~Stream() {
    if (!call_) return;
    context_->TryCancel();
    finish();
}

v1::ApplyResponse Stream::apply(const v1::ApplyRequest &batch) {
    v1::ApplyResponse answer;
    client_->until_answered([&](grpc::ClientContext *) { return attempt(batch, &answer); });
    return answer;
}

grpc::Status Stream::attempt(const v1::ApplyRequest &batch, v1::ApplyResponse *answer) {
    if (!call_) {
        context_ = std::make_unique<grpc::ClientContext>();
        client_->authorize(context_.get());
        call_ = v1::MemoryService::NewStub(client_->channel_)
                    ->AsyncStream(context_.get(), &queue_, nullptr);
        if (!wait()) return finish();
    }
    v1::StreamRequest request;
    v1::StreamResponse response;
    *request.mutable_apply() = batch;
    call_->Write(request, nullptr);
    if (!wait()) return finish();
    call_->Read(&response, nullptr);
    if (!wait()) return finish();
    *answer = response.apply();
    return grpc::Status::OK;
}

/* Wait for the one operation under way; return whether it worked. Late, it ends the stream. */
bool Stream::wait() {
    void *tag;
    bool worked = false;
    const auto late = std::chrono::system_clock::now() + client_->options_.timeout;
    if (queue_.AsyncNext(&tag, &worked, late) == grpc::CompletionQueue::GOT_EVENT) return worked;
    context_->TryCancel();
    queue_.Next(&tag, &worked);
    return false;
}

/* Return how the stream ended. */
grpc::Status Stream::finish() {
    grpc::Status status;
    call_->Finish(&status, nullptr);
    wait();
    call_.reset();
    if (!status.ok()) return status;
    return {grpc::StatusCode::UNAVAILABLE, "the service ended the stream without an answer"};
}

Pool::Pool(Client &client, v1::OpenPoolResponse opened)
    : client_(&client), opened_(std::move(opened)) {}

/* Send a message under the next number, and again under another if that was used up. */
template <class Request, class Call> auto Pool::send(Request request, Call call) {
    if (fenced_) throw *fenced_;
    for (int tries = MOST_NUMBERS;; tries--) {
        *request.mutable_pool() = opened_.pool();
        if (opened_.pool().owner() != 0) request.mutable_pool()->set_number(++number_);
        try {
            return call(request);
        } catch (const Error &error) {
            if (error.fenced()) fenced_ = error;
            if (error.reason != "LATE" || tries == 1) throw;
            const auto last = error.metadata.find("last");
            if (last != error.metadata.end()) number_ = std::max<uint64_t>(number_, std::stoull(last->second));
        }
    }
}

void Pool::insist_on_answers() const {
    if (pending_) throw std::logic_error("a batch has no answer: resume()");
}

v1::ApplyResponse Pool::apply(v1::ApplyRequest batch) {
    insist_on_answers();
    batch.set_seq(seq_ + 1);
    if (batch.completed_seq() == 0) batch.set_completed_seq(completed_seq_);
    pending_ = std::move(batch);
    return resume();
}

v1::ApplyResponse Pool::resume() {
    if (!pending_) throw std::logic_error("every batch was answered");
    try {
        v1::ApplyResponse answer = send(*pending_, [&](const v1::ApplyRequest &batch) {
            return stream_ ? stream_->apply(batch)
                           : client_->call(&v1::MemoryService::Stub::Apply, batch);
        });
        seq_ = pending_->seq();
        completed_seq_ = pending_->completed_seq();
        pending_.reset();
        return answer;
    } catch (const Error &error) {
        if (!error.perhaps_done() && !error.not_begun()) pending_.reset();
        throw;
    }
}

void Pool::keep_alive() {
    if (fenced_) throw *fenced_;
    v1::KeepAliveRequest request;
    *request.mutable_pool() = opened_.pool();
    try {
        client_->call(&v1::MemoryService::Stub::KeepAlive, request);
    } catch (const Error &error) {
        if (error.fenced()) fenced_ = error;
        throw;
    }
}

v1::ReconcileResponse Pool::reconcile(const std::vector<uint64_t> &handles,
                                      std::optional<uint64_t> completed_seq) {
    if (!handles.empty()) insist_on_answers();
    v1::ReconcileRequest request;
    request.mutable_handles()->Add(handles.begin(), handles.end());
    request.set_completed_seq(completed_seq.value_or(seq_));
    v1::ReconcileResponse answer = send(request, [&](const v1::ReconcileRequest &message) {
        return client_->call(&v1::MemoryService::Stub::Reconcile, message);
    });
    pending_.reset();
    seq_ = completed_seq_ = answer.last_seq();
    return answer;
}

v1::Place Pool::allocate(const v1::Alloc &alloc) {
    insist_on_answers();
    v1::AllocateRequest request;
    *request.mutable_allocate() = alloc;
    return send(request, [&](const v1::AllocateRequest &message) {
        return client_->call(&v1::MemoryService::Stub::Allocate, message).place();
    });
}

v1::Place Pool::extend(const v1::Extend &extend) {
    insist_on_answers();
    v1::ExtendRequest request;
    *request.mutable_extend() = extend;
    return send(request, [&](const v1::ExtendRequest &message) {
        return client_->call(&v1::MemoryService::Stub::Extend, message).place();
    });
}

bool Pool::free(const v1::Freeing &freeing) {
    insist_on_answers();
    v1::FreeRequest request;
    *request.mutable_free() = freeing;
    return send(request, [&](const v1::FreeRequest &message) {
        return client_->call(&v1::MemoryService::Stub::Free, message).already_free();
    });
}

v1::GetPoolResponse Pool::books() {
    v1::GetPoolRequest request;
    request.set_name(opened_.pool().name());
    return client_->call(&v1::PoolService::Stub::GetPool, request);
}

void Pool::close() {
    end_stream();
    send(v1::ClosePoolRequest(), [&](const v1::ClosePoolRequest &message) {
        return client_->call(&v1::MemoryService::Stub::ClosePool, message);
    });
}

} // namespace odma
