/* client.h - a small client of ODMA for C++17.
 *
 *     odma::Client service("127.0.0.1:50051");
 *     odma::Pool pool = service.open_pool(request);
 *     odma::v1::ApplyResponse answer = pool.apply(batch);
 *
 * It keeps the promises that an engine must keep: one unanswered call a pool, seq
 * counted up by one, and after a lost answer the *same* message again until the
 * answer is here. It says which process it is and numbers what it sends, so that a
 * message that comes late changes nothing.
 *
 * Messages  are those of proto/odma/v1, whose comments say what they mean.
 * Errors    What the service refuses, and what nobody answers, throws
 *           odma::Error. A refused operation of a batch is a Result, no error.
 * Threads   A client and its pools belong to one thread. To overlap a step give
 *           them a thread of their own.
 */
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <grpcpp/grpcpp.h>

#include "odma/v1/memory_service.grpc.pb.h"
#include "odma/v1/pool_service.grpc.pb.h"

namespace odma {

/* A status of the service, with what its details tell. */
class Error : public std::runtime_error {
  public:
    explicit Error(const grpc::Status &status);

    /* Whether nobody knows if the call was done. */
    bool perhaps_done() const;
    /* Whether there was no room for the call, which was not begun. */
    bool not_begun() const;
    /* Whether another process owns the pool: stop using its memory, and do not open it again. */
    bool fenced() const { return reason == "FENCED"; }

    grpc::StatusCode code;
    std::string reason;                          /* of the ErrorInfo, as "SEQ_GAP" */
    std::map<std::string, std::string> metadata; /* of the ErrorInfo */
    std::string field;                           /* the first that breaks a rule, "" if none */
    std::optional<v1::Refusal> refusal;          /* why a unary call was refused */
    std::chrono::milliseconds retry_after{0};    /* to wait before the next try */
};

struct Options {
    std::chrono::milliseconds timeout{5'000}; /* of one attempt */
    std::chrono::milliseconds retry{30'000};  /* of all attempts of a call together */
    std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
    std::string token; /* sent as `authorization: Bearer`, if it is not empty */
};

class Pool;
class Stream;

/* A connection to the service, made again whenever it breaks. */
class Client {
  public:
    /* target   "127.0.0.1:50051" or "unix:/run/odma.sock" */
    explicit Client(std::string target, Options options = {});

    /* Start an epoch of a pool, or go on with that of the same open_id as its owner. instance,
     * attempt and seen are put in here. */
    Pool open_pool(v1::OpenPoolRequest request);

    /* For operators, of a pool that somebody else may own: `pool` as GetPool and ListPools tell
     * it. Close one, when nothing is enqueued that uses its memory. Remove a closed one and what
     * it has learnt; one that is gone stays gone. Change a policy, or find its limits anew, in
     * place of the version that was read: after a lost answer VERSION may be one's own change. */
    void close_pool(const v1::PoolRef &pool);
    void forget_pool(const v1::PoolRef &pool);
    v1::Policy set_policy(const v1::PoolRef &pool, const v1::PolicyChange &change,
                          uint32_t expected_version);
    v1::RecalibrateResponse recalibrate(const v1::PoolRef &pool, uint32_t expected_version,
                                        bool dry_run = false);

    /* Make a unary call, the same message again while the service is away or has no room:
     *
     *     client.call(&v1::PoolService::Stub::GetPool, request)
     */
    template <class Stub, class Request, class Answer>
    Answer call(grpc::Status (Stub::*rpc)(grpc::ClientContext *, const Request &, Answer *),
                const Request &request) {
        Answer answer;
        until_answered([&](grpc::ClientContext *context) {
            Stub stub(channel_);
            return (stub.*rpc)(context, request, &answer);
        });
        return answer;
    }

  private:
    friend class Stream;

    void connect();
    void authorize(grpc::ClientContext *context) const;
    void until_answered(const std::function<grpc::Status(grpc::ClientContext *)> &attempt);

    std::string target_;
    Options options_;
    std::shared_ptr<grpc::Channel> channel_;
    std::string instance_;
    uint32_t attempts_ = 0; /* of OpenPool */
};

/* Apply over one stream: one batch, one answer. It is opened when it is first used, and anew
 * after it ended. It must not outlive its client.
 */
class Stream {
  public:
    explicit Stream(Client &client) : client_(&client) {}
    ~Stream();

    /* As Apply, with the same retries. */
    v1::ApplyResponse apply(const v1::ApplyRequest &batch);

  private:
    using Call = grpc::ClientAsyncReaderWriter<v1::StreamRequest, v1::StreamResponse>;

    grpc::Status attempt(const v1::ApplyRequest &batch, v1::ApplyResponse *answer);
    bool wait();
    grpc::Status finish();

    Client *client_;
    grpc::CompletionQueue queue_;
    std::unique_ptr<grpc::ClientContext> context_;
    std::unique_ptr<Call> call_;
};

/* One epoch of a pool. What is sent is numbered here. It must not outlive its client. After an
 * error that is fenced() every call that changes something throws it again.
 */
class Pool {
  public:
    Pool(Client &client, v1::OpenPoolResponse opened);

    /* capacity_tokens, block_tokens, max_ops and so on. */
    const v1::OpenPoolResponse &opened() const { return opened_; }
    /* The last answered batch. */
    uint64_t seq() const { return seq_; }

    /* Do the operations of one decode step. `batch` has used, ops, and what else is not the
     * default; pool and seq are put in here. completed_seq 0: as in the batch before. After an
     * error that is perhaps_done() or not_begun() resume().
     */
    v1::ApplyResponse apply(v1::ApplyRequest batch);
    /* Have the batch answered that has no answer. */
    v1::ApplyResponse resume();
    /* Whether there is one. Until it is answered no other call is made but reconcile({}), which
     * drops it, and close(): they throw std::logic_error. */
    bool pending() const { return pending_.has_value(); }

    /* Send batches over one stream from now on, which takes less time than calls; or as calls. */
    void start_stream() { stream_ = std::make_unique<Stream>(*client_); }
    void end_stream() { stream_.reset(); }

    /* Tell that the owner lives, when it has nothing else to say for ttl_seconds. */
    void keep_alive();

    /* After the engine lost its own state: keep these regions, free all others. The copies of
     * the answers up to completed_seq are done (unset: those that came here); below the last
     * answered seq nothing can be kept. */
    v1::ReconcileResponse reconcile(const std::vector<uint64_t> &handles,
                                    std::optional<uint64_t> completed_seq = std::nullopt);

    v1::Place allocate(const v1::Alloc &alloc);
    v1::Place extend(const v1::Extend &extend);
    /* Return whether it had been given back before. */
    bool free(const v1::Freeing &freeing);

    /* All that the service knows of the pool. */
    v1::GetPoolResponse books();

    /* End the epoch. No work that uses the pool's memory may be enqueued. */
    void close();

  private:
    template <class Request, class Call> auto send(Request request, Call call);
    void insist_on_answers() const;

    Client *client_;
    v1::OpenPoolResponse opened_;
    uint64_t number_ = 0; /* of the last message */
    std::optional<Error> fenced_;
    std::optional<v1::ApplyRequest> pending_;
    uint64_t seq_ = 0;
    uint64_t completed_seq_ = 0;
    std::unique_ptr<Stream> stream_;
};

} // namespace odma
