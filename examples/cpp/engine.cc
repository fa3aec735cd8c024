/* engine.cc - a serving engine's decode step against ODMA, with a pretend device.
 *
 *     build/cpp/engine 127.0.0.1:50051
 *
 * The device memory is an array of token ids. The engine executes every copy it
 * is told, and before each step it looks whether each token of each request
 * lies where the books say. It exits with 1 if one does not.
 */
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <random>

#include "client.h"

namespace v1 = odma::v1;

constexpr uint32_t CAPACITY = 4096, MODEL_LENGTH = 1024, REQUESTS = 100, BATCH_CAP = 32;

struct Request {
    uint32_t id, prompt, output, generated = 0;
    v1::Place place = {}; /* handle 0: not admitted */
    bool preempt = false;

    uint32_t total() const { return prompt + generated; }
    bool finished() const { return generated == output; }
    bool full() const { return total() == place.length_tokens(); }
    uint64_t token(uint32_t position) const { return uint64_t{id + 1} << 32 | position; }
};

/* Continuous batching, first come first served, on one ordered stream. */
class Engine {
  public:
    Engine(odma::Pool &pool, std::vector<Request> &requests) : pool_(pool), memory_(CAPACITY) {
        for (Request &request : requests) queue_.push_back(&request);
    }

    bool idle() const { return queue_.empty() && running_.empty(); }

    void step() {
        std::vector<Request *> asked; /* whom each operation is about */
        const v1::ApplyRequest batch = plan(&asked);
        const v1::ApplyResponse answer = pool_.apply(batch);

        for (const v1::Copy &copy : answer.copies()) {
            std::memmove(&memory_[copy.to_token()], &memory_[copy.from_token()],
                         copy.tokens() * sizeof memory_[0]);
            copies++;
        }
        for (const v1::Place &place : answer.moved()) find(place.handle())->place = place;
        for (int i = 0; i < answer.results_size(); i++) settle(asked[i], answer.results(i));
        const auto gone = [](const Request *request) { return request->place.handle() == 0; };
        running_.erase(std::remove_if(running_.begin(), running_.end(), gone), running_.end());

        for (const Request *request : running_) verify(*request);
        for (Request *request : running_) {
            if (request->finished() || request->full()) continue; /* no room: sits this one out */
            request->generated++;                                 /* the decode step */
            write(*request, request->total() - 1);
        }
        steps++;
    }

    unsigned steps = 0, finished = 0, refusals = 0, preempted = 0, copies = 0;

  private:
    /* What this step asks. */
    v1::ApplyRequest plan(std::vector<Request *> *asked) {
        v1::ApplyRequest batch;
        const auto op = [&](Request *request) {
            asked->push_back(request);
            return batch.add_ops();
        };
        batch.set_completed_seq(pool_.seq()); /* this device has done all it was told by now */
        for (Request *request : running_) {
            const uint64_t handle = request->place.handle();
            v1::Used *used = batch.add_used();
            used->set_handle(handle);
            used->set_used_tokens(request->total());
            if (request->finished() || request->preempt) {
                v1::Freeing *free = op(request)->mutable_free();
                free->set_handle(handle);
                free->set_end(request->finished() ? v1::END_FINISHED : v1::END_PREEMPTED);
                free->set_output_tokens(request->generated);
            } else if (request->full()) {
                v1::Extend *extend = op(request)->mutable_extend();
                extend->set_handle(handle);
                extend->set_least_tokens(request->total() + 1);
            }
        }
        for (size_t i = 0; i < queue_.size() && running_.size() + i < BATCH_CAP; i++) {
            v1::Alloc *allocate = op(queue_[i])->mutable_allocate();
            allocate->set_request_id("request-" + std::to_string(queue_[i]->id));
            allocate->set_prompt_tokens(queue_[i]->prompt);
            allocate->set_generated_tokens(queue_[i]->generated);
            allocate->set_max_total_tokens(MODEL_LENGTH);
        }
        return batch;
    }

    /* Take the outcome of one operation into the engine's own state. */
    void settle(Request *request, const v1::Result &result) {
        const bool runs = request->place.handle() != 0;
        if (result.has_place()) {
            request->place = result.place();
            if (runs) return;
            queue_.erase(std::find(queue_.begin(), queue_.end(), request));
            running_.push_back(request);
            write(*request, 0); /* the prefill computes all its tokens at once */
        } else if (result.has_refusal()) {
            const v1::Refusal &refusal = result.refusal();
            refusals += refusal.reason() != v1::REFUSAL_REASON_SKIPPED;
            const bool no_room = refusal.reason() == v1::REFUSAL_REASON_NO_SPACE ||
                                 refusal.reason() == v1::REFUSAL_REASON_FRAGMENTED;
            Request *victim = no_room ? find(refusal.preempt_handle()) : nullptr;
            if (victim) victim->preempt = true;
        } else { /* given back */
            request->place.Clear();
            request->preempt = false;
            if (request->finished()) finished++;
            else queue_.push_front(request), preempted++;
        }
    }

    /* The running request of a handle, if it still runs. */
    Request *find(uint64_t handle) const {
        const auto found = std::find_if(running_.begin(), running_.end(), [&](Request *request) {
            return handle != 0 && request->place.handle() == handle;
        });
        return found == running_.end() ? nullptr : *found;
    }

    void write(const Request &request, uint32_t first) {
        for (uint32_t i = first; i < request.total(); i++)
            memory_.at(request.place.start_token() + i) = request.token(i);
    }

    void verify(const Request &request) const {
        for (uint32_t i = 0; i < request.total(); i++)
            if (memory_.at(request.place.start_token() + i) != request.token(i))
                throw std::logic_error("token " + std::to_string(i) + " of request " +
                                       std::to_string(request.id) + " is not where it should be");
    }

    odma::Pool &pool_;
    std::vector<uint64_t> memory_;
    std::deque<Request *> queue_;
    std::vector<Request *> running_;
};

static std::vector<Request> make_requests() {
    std::mt19937 random(7);
    std::vector<Request> requests;
    for (uint32_t id = 0; id < REQUESTS; id++) {
        const uint32_t prompt = 16 + uint32_t(random() % 200);
        const double tail = 80 / (double(random()) / 4294967296.0 + 0.08) - 70; /* most are short */
        requests.push_back({id, prompt, std::min(1 + uint32_t(std::max(tail, 0.0)), 800U)});
    }
    return requests;
}

static v1::OpenPoolRequest opening() {
    v1::OpenPoolRequest request;
    request.set_open_id("engine-" + std::to_string(std::random_device{}()));
    request.set_name("example-cpp");
    v1::PlaneGroup *planes = request.mutable_geometry()->add_planes();
    planes->set_count(56);
    planes->set_bytes_per_token(1024);
    request.set_capacity_tokens(CAPACITY);
    request.set_model_length_tokens(MODEL_LENGTH);
    request.set_moves(v1::MOVES_ANY);
    request.set_single_ordered_stream(true);
    request.set_copies_may_overlap(true);
    request.set_take_over(true); /* the memory of an earlier run is gone, and so is its owner */
    return request;
}

int main(int argc, char **argv) try {
    odma::Client service(argc > 1 ? argv[1] : "127.0.0.1:50051");
    odma::Pool pool = service.open_pool(opening());
    std::vector<Request> requests = make_requests();
    Engine engine(pool, requests);
    while (!engine.idle()) engine.step();
    if (pool.books().summary().free_tokens() != CAPACITY)
        throw std::logic_error("the books do not balance");
    pool.close();
    std::printf("steps %u, finished %u, refusals %u, preempted %u, copies %u\n", engine.steps,
                engine.finished, engine.refusals, engine.preempted, engine.copies);
} catch (const std::exception &error) {
    std::fprintf(stderr, "violation or failure: %s\n", error.what());
    return 1;
}
