/* runner.cc - plays the conformance scenarios against a server.
 *
 *     build/cpp/runner FILE 127.0.0.1:50051 [PART OF A NAME]
 *
 * FILE is tests/conformance/scenarios.json. The README.md beside it explains the
 * file and what is checked.
 */
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <limits>
#include <random>
#include <set>

#include <absl/strings/escaping.h>
#include <google/protobuf/util/json_util.h>
#include <nlohmann/json.hpp>

#include "client.h"
#include "odma/v1/emulator_service.grpc.pb.h"
#include "odma/v1/predictor_service.grpc.pb.h"

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using std::string;
using json = nlohmann::ordered_json; /* patterns bind names in the order of the file */
using Names = std::map<string, json>;

/* What is seen is not what the scenario says. */
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

static void insist(bool fact, const string &message) {
    if (!fact) throw Failure(message);
}

static const size_t KEY_BYTES = 16;

/* --- messages and patterns --- */

static bool is_name(const json &value) {
    return value.is_string() && value.get_ref<const string &>().rfind('$', 0) == 0;
}

static json fill(const json &value, const Names &names);

static json sum(const json &terms, const Names &names) {
    json filled = fill(terms, names);
    if (filled[0].is_number_float()) return filled[0].get<double>() + filled[1].get<double>();
    int64_t total = 0;
    for (const json &term : filled) total += term.get<int64_t>();
    return total;
}

/* Replace names and expressions in a message. */
static json fill(const json &value, const Names &names) {
    if (is_name(value)) {
        const auto bound = names.find(value);
        insist(bound != names.end(), value.dump() + " is not bound");
        return bound->second;
    }
    if (!value.is_structured()) return value;
    if (value.contains("$plus")) return sum(value["$plus"], names);
    if (value.contains("$times")) {
        const json given = fill(value["$times"], names);
        const size_t times = given[0];
        if (!given[1].is_string()) return json(times, given[1]);
        string text;
        for (size_t i = 0; i < times; i++) text += given[1].get_ref<const string &>();
        return text;
    }
    if (value.contains("$keys")) {
        string keys;
        for (const char letter : fill(value["$keys"], names).get<string>()) keys += string(KEY_BYTES, letter);
        return absl::Base64Escape(keys);
    }
    json filled = value;
    for (json &item : filled) item = fill(item, names);
    return filled;
}

static bool holds(const string &kind, const json &wanted, const json &value, Names &names,
                  const string &path);

/* Throw unless `value` matches; bind the names that are met first. */
static void match(const json &pattern, const json &value, Names &names, const string &path) {
    const auto right = [&](bool fact, const string &what) {
        insist(fact, path + ": " + what + ", not " + value.dump());
    };
    if (pattern == "$any") return;
    if (is_name(pattern)) {
        const json &bound = names.emplace(pattern, value).first->second;
        right(bound == value, pattern.dump() + " is " + bound.dump());
    } else if (pattern.is_array()) {
        right(value.is_array() && value.size() == pattern.size(), pattern.dump());
        for (size_t i = 0; i < pattern.size(); i++)
            match(pattern[i], value[i], names, path + "[" + std::to_string(i) + "]");
    } else if (!pattern.is_object()) {
        right(pattern == value, pattern.dump());
    } else {
        for (const auto &[key, item] : pattern.items()) {
            if (is_name(key)) {
                right(holds(key, item, value, names, path), key + " " + item.dump());
            } else {
                right(value.is_object(), pattern.dump());
                insist(value.contains(key), path + " has no " + key);
                match(item, value[key], names, path + "." + key);
            }
        }
        right(!pattern.empty() || value.is_object(), pattern.dump());
    }
}

/* Whether each pattern has a value of its own. */
static bool in_some_order(const json &patterns, json values, Names &names, const string &path) {
    if (!values.is_array() || values.size() != patterns.size()) return false;
    return std::all_of(patterns.begin(), patterns.end(), [&](const json &pattern) {
        for (size_t i = 0; i < values.size(); i++) {
            Names trial = names;
            try {
                match(pattern, values[i], trial, path);
            } catch (const Failure &) {
                continue;
            }
            names = trial;
            values.erase(i);
            return true;
        }
        return false;
    });
}

/* Whether a value keeps one constraint. */
static bool holds(const string &kind, const json &wanted, const json &value, Names &names,
                  const string &path) {
    if (kind == "$in") {
        const json known = fill(wanted, names);
        return std::find(known.begin(), known.end(), value) != known.end();
    }
    if (kind == "$range") {
        const json bounds = fill(wanted, names);
        return value.is_number() && bounds[0] <= value && value <= bounds[1];
    }
    if (kind == "$contains")
        return value.is_string() && value.get<string>().find(wanted.get<string>()) != string::npos;
    if (kind == "$not") return fill(wanted, names) != value;
    if (kind == "$plus") return sum(wanted, names) == value;
    if (kind == "$unordered") return in_some_order(wanted, value, names, path);
    insist(kind == "$as", kind + " is no pattern");
    match(wanted, value, names, path);
    return true;
}

static json plain(const Message &message);

/* One value of a field; `index` is -1 where the field is not repeated. */
static json plain(const Message &message, const FieldDescriptor *field, int index) {
    const auto *reflection = message.GetReflection();
    const auto get = [&](auto one, auto of_many) -> decltype(auto) {
        return index < 0 ? (reflection->*one)(message, field)
                         : (reflection->*of_many)(message, field, index);
    };
    using Reflection = google::protobuf::Reflection;
    switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_UINT32:
        return get(&Reflection::GetUInt32, &Reflection::GetRepeatedUInt32);
    case FieldDescriptor::CPPTYPE_UINT64:
        return get(&Reflection::GetUInt64, &Reflection::GetRepeatedUInt64);
    case FieldDescriptor::CPPTYPE_DOUBLE:
        return get(&Reflection::GetDouble, &Reflection::GetRepeatedDouble);
    case FieldDescriptor::CPPTYPE_BOOL:
        return get(&Reflection::GetBool, &Reflection::GetRepeatedBool);
    case FieldDescriptor::CPPTYPE_STRING:
        return get(&Reflection::GetString, &Reflection::GetRepeatedString);
    case FieldDescriptor::CPPTYPE_ENUM:
        return get(&Reflection::GetEnum, &Reflection::GetRepeatedEnum)->name();
    case FieldDescriptor::CPPTYPE_MESSAGE:
        return plain(index < 0 ? reflection->GetMessage(message, field)
                               : reflection->GetRepeatedMessage(message, field, index));
    default: throw Failure(field->full_name() + " is of a type that this program does not know");
    }
}

/* A message as plain values: an unset message field is null, enums are names. */
static json plain(const Message &message) {
    json values = json::object();
    const auto *descriptor = message.GetDescriptor();
    const auto *reflection = message.GetReflection();
    for (int i = 0; i < descriptor->field_count(); i++) {
        const FieldDescriptor *field = descriptor->field(i);
        json &value = values[field->name()];
        if (field->is_repeated()) {
            value = json::array();
            for (int k = 0; k < reflection->FieldSize(message, field); k++)
                value.push_back(plain(message, field, k));
        } else if (!field->has_presence() || reflection->HasField(message, field)) {
            value = plain(message, field, -1);
        }
    }
    return values;
}

template <class Request> static Request parsed(const json &message) {
    Request request;
    const auto status = google::protobuf::util::JsonStringToMessage(message.dump(), &request);
    insist(status.ok(), "no message: " + string(status.message()));
    return request;
}

/* --- rpcs by their names --- */

using Rpc = std::function<json(odma::Client &, const json &)>;

template <class Stub, class Request, class Answer>
static Rpc rpc(grpc::Status (Stub::*method)(grpc::ClientContext *, const Request &, Answer *)) {
    return [method](odma::Client &client, const json &message) {
        return plain(client.call(method, parsed<Request>(message)));
    };
}

using Memory = odma::v1::MemoryService::Stub;
using Pools = odma::v1::PoolService::Stub;

static const std::map<string, Rpc> RPCS = {
    {"OpenPool", rpc(&Memory::OpenPool)},
    {"ClosePool", rpc(&Memory::ClosePool)},
    {"KeepAlive", rpc(&Memory::KeepAlive)},
    {"Apply", rpc(&Memory::Apply)},
    {"Allocate", rpc(&Memory::Allocate)},
    {"Extend", rpc(&Memory::Extend)},
    {"Free", rpc(&Memory::Free)},
    {"Reconcile", rpc(&Memory::Reconcile)},
    {"Recalibrate", rpc(&Memory::Recalibrate)},
    {"SetPolicy", rpc(&Memory::SetPolicy)},
    {"ListPools", rpc(&Pools::ListPools)},
    {"GetPool", rpc(&Pools::GetPool)},
    {"ListRegions", rpc(&Pools::ListRegions)},
    {"ForgetPool", rpc(&Pools::ForgetPool)},
    {"Predict", rpc(&odma::v1::PredictorService::Stub::Predict)},
    {"EstimateAccess", rpc(&odma::v1::EmulatorService::Stub::EstimateAccess)},
};

static const std::set<string> BY_NAME = {"GetPool", "ListRegions"};
static const std::set<string> WITHOUT_POOL = {"GetPool",   "ListRegions", "OpenPool",
                                              "ListPools", "Predict",     "EstimateAccess"};

static const Rpc &find_rpc(const string &name) {
    const auto found = RPCS.find(name);
    insist(found != RPCS.end(), "this program knows no rpc " + name);
    return found->second;
}

/* --- the engine --- */

/* A region as the engine sees it, and the keys of its granules. */
struct Held {
    uint32_t start, length, written, reused, shared_start, shared;
    std::vector<string> keys;

    uint32_t end() const { return start + length - shared; }
    /* Where a token lies. */
    uint32_t at(uint32_t token) const {
        return token < shared ? shared_start + token : start + token - shared;
    }
};

/* Add the keys that an Alloc or a Freeing brings. */
static void add_keys(std::vector<string> &keys, const json &op) {
    string data;
    absl::Base64Unescape(op.value("keys", string()), &data);
    for (size_t i = 0; i < data.size(); i += KEY_BYTES) keys.push_back(data.substr(i, KEY_BYTES));
}

/* What an engine knows of one epoch, and the memory that it writes. */
class Engine {
  public:
    Engine(odma::Client &client, json opening, const json &answer)
        : pool(client, parsed<odma::v1::OpenPoolResponse>(answer)), opened(answer),
          capacity(answer["capacity_tokens"]), request_(std::move(opening)),
          ordered_(request_.value("single_ordered_stream", false)),
          granule_(answer["granule_tokens"]), memory_(capacity), vacated_by_(capacity, 0),
          read_by_(capacity, 0) {}

    /* Take an answer of Apply: copies first, then places. */
    void applied(const json &batch, const json &answer) {
        std::map<uint64_t, json> used;
        for (const json &one : batch["used"]) used[one["handle"]] = one;
        for (auto &[handle, held] : regions)
            if (used.count(handle)) write(handle, held, used[handle].value("used_tokens", 0U));
        for (const json &op : batch["ops"])
            if (op.contains("free")) name(op["free"]);
        const std::vector<uint64_t> before = owners();
        copy(batch, answer, used, before);
        for (size_t i = 0; i < batch["ops"].size(); i++) {
            const json &op = batch["ops"][i], &result = answer["results"][i];
            if (!result["place"].is_null())
                placed(result["place"], op.value("allocate", json::object()));
            else if (op.contains("free") && result["refusal"].is_null())
                regions.erase(op["free"]["handle"].get<uint64_t>());
        }
        for (const json &place : answer["moved"]) placed(place, json::object());
        vacate(before, batch);
        seq = answer["seq"];
    }

    /* Take a place; its region may be new, then `asked` is its Alloc. */
    void placed(const json &place, const json &asked) {
        const uint32_t length = place["length_tokens"], reused = place["reused_tokens"];
        if (length == 0) return;
        const auto [found, is_new] = regions.try_emplace(place["handle"].get<uint64_t>());
        Held &held = found->second;
        if (is_new) {
            held.written = held.reused = reused;
            add_keys(held.keys, asked);
        }
        held.start = place["start_token"];
        held.length = length;
        held.written = std::min(held.written, length);
        held.shared_start = place["shared_start_token"];
        held.shared = place["shared_tokens"];
    }

    /* A region is no more, by a unary Free. */
    void freed(const json &free) {
        name(free);
        regions.erase(free["handle"].get<uint64_t>());
    }

    /* Only these regions are left, and nothing waits. */
    void kept(const json &handles) {
        for (auto it = regions.begin(); it != regions.end();) {
            const bool keep = std::find(handles.begin(), handles.end(), it->first) != handles.end();
            it = keep ? std::next(it) : regions.erase(it);
        }
        std::fill(vacated_by_.begin(), vacated_by_.end(), 0);
        std::fill(read_by_.begin(), read_by_.end(), 0);
    }

    /* The rules that hold between calls. */
    void check() const {
        const uint32_t block = opened["block_tokens"];
        owners();
        for (const auto &[handle, held] : regions) {
            const string who = std::to_string(handle);
            insist(held.start % block == 0 && held.length % block == 0,
                   who + " is not whole blocks");
            insist(held.end() <= capacity, who + " ends beyond the capacity");
            for (uint32_t i = 0; i < held.written; i++)
                insist(memory_[held.at(i)] == token(handle, i),
                       "token " + std::to_string(i) + " of " + who + " is lost");
        }
    }

    odma::Pool pool;
    const json opened;
    const uint32_t capacity;
    uint64_t seq = 0;
    std::map<uint64_t, Held> regions;

  private:
    using Token = std::pair<string, uint32_t>; /* key of its granule or handle, position */

    /* What a written token is: the same in all requests whose granule has this key. */
    Token token(uint64_t handle, uint32_t i) const {
        const Held &held = regions.at(handle);
        const bool keyed = granule_ != 0 && i / granule_ < held.keys.size();
        return {keyed ? held.keys[i / granule_] : std::to_string(handle), i};
    }

    void write(uint64_t handle, Held &held, uint32_t tokens) {
        for (; held.written < tokens; held.written++)
            memory_.at(held.at(held.written)) = token(handle, held.written);
    }

    /* Give what a region has written the keys that its Free brings. */
    void name(const json &free) {
        const auto found = regions.find(free["handle"].get<uint64_t>());
        if (found == regions.end()) return;
        Held &held = found->second;
        add_keys(held.keys, free);
        for (uint32_t i = 0; i < held.written; i++) memory_[held.at(i)] = token(found->first, i);
    }

    /* The handle that holds each token, or 0. */
    std::vector<uint64_t> owners() const {
        std::vector<uint64_t> found(capacity, 0);
        for (const auto &[handle, held] : regions)
            for (uint32_t i = held.start; i < std::min(held.end(), capacity); i++) {
                insist(!found[i], std::to_string(handle) + " and " + std::to_string(found[i]) +
                                      " both hold token " + std::to_string(i));
                found[i] = handle;
            }
        return found;
    }

    bool may_move(uint64_t handle, const json &batch) const {
        const bool growing =
            std::any_of(batch["ops"].begin(), batch["ops"].end(), [&](const json &op) {
                return op.contains("extend") && op["extend"]["handle"] == handle;
            });
        return request_["moves"] == "MOVES_ANY" ||
               (request_["moves"] == "MOVES_OWN_GROWTH" && growing);
    }

    void copy(const json &batch, const json &answer, const std::map<uint64_t, json> &used,
              const std::vector<uint64_t> &before) {
        std::map<uint64_t, std::vector<uint32_t>> at; /* where each token is now */
        for (const auto &[handle, held] : regions)
            for (uint32_t i = 0; i < held.written; i++) at[handle].push_back(held.at(i));
        for (const json &op : batch["ops"])
            if (op.contains("free")) at.erase(op["free"]["handle"].get<uint64_t>());

        std::map<uint64_t, uint32_t> admitted; /* what new regions reuse */
        for (size_t i = 0; i < batch["ops"].size(); i++) {
            const json &place = answer["results"][i]["place"];
            if (batch["ops"][i].contains("allocate") && !place.is_null() &&
                regions.count(place["handle"]) == 0)
                admitted[place["handle"]] = place["reused_tokens"];
        }
        uint64_t carried = 0;
        std::set<uint32_t> targets;
        for (const json &one : answer["copies"]) {
            const string what = "copy " + one.dump();
            const uint64_t handle = one["handle"];
            const uint32_t from = one["from_token"], to = one["to_token"], tokens = one["tokens"];
            const bool gathers = admitted.count(handle) > 0;
            insist(gathers || may_move(handle, batch), what + " is against moves");
            const json said = used.count(handle) ? used.at(handle) : json::object();
            insist(!said.value("pinned", false), what + " is of a pinned region");
            const uint32_t most =
                gathers ? admitted[handle] : most_copied(handle, used, what);
            insist(1 <= tokens && tokens <= most, what + " carries too much");
            const bool overlaps = (from < to ? to - from : from - to) < tokens;
            insist(one["overlaps"] == overlaps, what + ": overlaps is wrong");
            insist(!overlaps || request_.value("copies_may_overlap", false),
                   what + " may not overlap");
            insist(uint64_t{std::max(from, to)} + tokens <= capacity,
                   what + " ends beyond the capacity");
            for (uint32_t i = to; i < to + tokens && !ordered_; i++) {
                insist(!before[i] &&
                           std::max(vacated_by_[i], read_by_[i]) <=
                               batch["completed_seq"].get<uint64_t>() &&
                           targets.insert(i).second,
                       what + " writes where something may still read");
            }
            if (gathers)
                std::fill_n(read_by_.begin() + from, tokens, batch["seq"].get<uint64_t>());
            move(from, to, tokens, at[handle]);
            for (const auto &[owner, places] : at)
                for (uint32_t i = 0; i < places.size(); i++)
                    insist(memory_[places[i]] == token(owner, i),
                           what + " loses a token of " + std::to_string(owner));
            carried += tokens;
        }
        insist(carried <= batch.value("max_copy_tokens", std::numeric_limits<uint64_t>::max()),
               "copies carry " + std::to_string(carried) + " tokens");
    }

    void move(uint32_t from, uint32_t to, uint32_t tokens, std::vector<uint32_t> &places) {
        const std::vector<Token> data(memory_.begin() + from, memory_.begin() + from + tokens);
        std::copy(data.begin(), data.end(), memory_.begin() + to);
        for (uint32_t &place : places)
            if (from <= place && place < from + tokens) place = place - from + to;
    }

    /* The most that a copy of a region that is there, or of a kept run, may carry. */
    uint32_t most_copied(uint64_t handle, const std::map<uint64_t, json> &used,
                         const string &what) const {
        if (handle == 0 && granule_ != 0) return capacity;
        insist(regions.count(handle) > 0, what + " is of no live region");
        const Held &held = regions.at(handle);
        const uint32_t said = used.count(handle) ? used.at(handle).value("used_tokens", 0U)
                                                 : held.length;
        return std::max({said, held.reused, static_cast<uint32_t>(held.keys.size()) * granule_});
    }

    void vacate(const std::vector<uint64_t> &before, const json &batch) {
        const std::vector<uint64_t> after = owners();
        for (uint32_t i = 0; i < capacity; i++) {
            if (before[i] == after[i]) continue;
            if (after[i] && !ordered_) {
                const Held &held = regions.at(after[i]);
                /* An adopted token is read, and not written. */
                const bool adopted = i - held.start + held.shared < held.reused;
                const uint64_t last = std::max(vacated_by_[i], adopted ? 0 : read_by_[i]);
                insist(!before[i] && last <= batch["completed_seq"].get<uint64_t>(),
                       "token " + std::to_string(i) + " is given out before its completion");
            }
            if (before[i]) vacated_by_[i] = batch["seq"];
        }
    }

    json request_;
    bool ordered_;
    uint32_t granule_;
    std::vector<Token> memory_;
    std::vector<uint64_t> vacated_by_; /* seq of the batch that left it */
    std::vector<uint64_t> read_by_;    /* seq of the batch that gathered from it */
};

/* --- playing --- */

/* Plays one scenario. */
class Player {
  public:
    Player(odma::Client &client, const json &script) : client_(client), script_(script) {
        std::random_device random;
        const string mark = std::to_string(random()) + std::to_string(random());
        names_["$name"] = "conformance-" + mark;
        for (const char *id : {"id", "id2", "id3"}) names_["$" + string(id)] = mark + id;
    }

    void play(const json &steps) {
        for (size_t i = 0; i < steps.size(); i++) {
            try {
                step(steps[i]);
            } catch (const std::exception &error) {
                throw Failure("step " + std::to_string(i + 1) + " (" +
                              steps[i].value("rpc", "other") + "): " + error.what());
            }
        }
    }

    void close() {
        streams_.clear();
        for (const auto &[name, engine] : engines_) {
            const json pool = {{"name", name}, {"epoch", engine.opened["pool"]["epoch"]}};
            find_rpc("ClosePool")(client_, {{"pool", pool}, {"by_operator", true}});
        }
    }

  private:
    void step(const json &step) {
        if (step.contains("repeat")) {
            for (int n = step["repeat"]; n > 0; n--) {
                const Names outside = names_;
                play(step["steps"]);
                names_ = outside;
            }
        } else if (step.contains("sort")) {
            sort(step);
        } else if (step.contains("play")) {
            play(script_["parts"][step["play"].get<string>()]);
        } else if (step.contains("error")) {
            fail(step, step["error"]);
        } else if (step.contains("invalid")) {
            fail(step, {{"code", "INVALID_ARGUMENT"},
                        {"reason", "INVALID"},
                        {"field", {{"$contains", step["invalid"]}}}});
        } else {
            succeed(step);
        }
    }

    void sort(const json &step) {
        auto handles = fill(step["sort"], names_).get<std::vector<uint64_t>>();
        const auto &regions = engine().regions;
        std::sort(handles.begin(), handles.end(), [&](uint64_t a, uint64_t b) {
            return regions.at(a).start < regions.at(b).start;
        });
        for (size_t i = 0; i < handles.size(); i++) names_[step["as"][i]] = handles[i];
    }

    void fail(const json &step, const json &wanted) {
        const json before = books();
        json told;
        try {
            call(step, message(step));
        } catch (const odma::Error &error) {
            told = {{"code", string(error.what()).substr(0, string(error.what()).find(':'))},
                    {"reason", error.reason},
                    {"metadata", error.metadata},
                    {"field", error.field},
                    {"refusal", error.refusal ? plain(*error.refusal) : json()}};
        }
        insist(!told.is_null(), "no error, but " + wanted.dump() + " is right");
        match(wanted, told, names_, "error");
        insist(books() == before, "the books changed");
    }

    void succeed(const json &step) {
        const json sent = message(step), before = books();
        const json answer = is_next(step, sent) ? apply(sent) : call(step, sent);
        note(step["rpc"], sent, answer);
        json wanted = json::object();
        if (step["rpc"] == "Apply")
            wanted = {{"replayed", false}, {"copies", json::array()}, {"moved", json::array()}};
        wanted.update(step.value("expect", json::object()));
        match(wanted, answer, names_, "answer");
        insist(!answer.value("replayed", false) || books() == before, "the books changed");
        agree();
    }

    /* Send a message as it is. */
    json call(const json &step, const json &sent) {
        if (!step.contains("stream")) return find_rpc(step["rpc"])(client_, sent);
        odma::Stream &stream = streams_.try_emplace(step["stream"], client_).first->second;
        return plain(stream.apply(parsed<odma::v1::ApplyRequest>(sent)));
    }

    /* Whether a message is the pool's next batch, in a pool without an owner number. */
    bool is_next(const json &step, const json &sent) {
        return step["rpc"] == "Apply" && !step.contains("stream") &&
               sent["pool"].value("owner", 0U) == 0 && sent["pool"] == engine().opened["pool"] &&
               sent["seq"] == engine().pool.seq() + 1;
    }

    /* Send a batch through the pool, which counts seq. */
    json apply(const json &sent) {
        return plain(engine().pool.apply(parsed<odma::v1::ApplyRequest>(sent)));
    }

    /* What is sent: the step's message with the fields that it leaves out. */
    json message(const json &step) {
        const string name = step["rpc"];
        json usual = json::object();
        if (name == "OpenPool") {
            usual = script_["defaults"];
            usual.update({{"name", names_["$name"]}, {"open_id", names_["$id"]}});
        }
        if (BY_NAME.count(name)) usual["name"] = names_["$name"];
        if (!WITHOUT_POOL.count(name)) usual["pool"] = names_["$pool"];
        json filled = usual;
        filled.update(fill(step.value("send", json::object()), names_));
        if (name == "OpenPool") {
            for (auto it = filled.begin(); it != filled.end();)
                it = it->is_null() ? filled.erase(it) : std::next(it);
        }
        if (name != "Apply") return filled;
        const auto known = engines_.find(filled["pool"]["name"]);
        const uint64_t seq = known == engines_.end() ? 0 : known->second.seq;
        json batch = {{"seq", seq + 1},
                      {"completed_seq", seq},
                      {"used", json::array()},
                      {"ops", json::array()}};
        batch.update(filled);
        return batch;
    }

    Engine &engine() { return engines_.at(names_.at("$pool")["name"]); }

    /* Tell the engine what was answered. */
    void note(const string &name, const json &sent, const json &answer) {
        if (name == "OpenPool") {
            const string pool = answer["pool"]["name"];
            names_["$pool"] = answer["pool"];
            const auto known = engines_.find(pool);
            const json &epoch = answer["pool"]["epoch"];
            if (known != engines_.end() && known->second.opened["pool"]["epoch"] == epoch) return;
            if (known != engines_.end()) engines_.erase(known);
            engines_.try_emplace(pool, client_, sent, answer);
        } else if (name == "ClosePool") {
            engines_.erase(sent["pool"]["name"].get<string>());
        } else if (name == "ForgetPool") {
            names_.erase("$pool");
        } else if (name == "Apply" && !answer["replayed"]) {
            insist(answer["seq"] == sent["seq"], "the answer is of another seq");
            insist(answer["results"].size() == sent["ops"].size(), "a result for each operation");
            engine().applied(sent, answer);
        } else if (name == "Allocate" || name == "Extend") {
            engine().placed(answer["place"], sent.value("allocate", json::object()));
        } else if (name == "Free") {
            engine().freed(sent["free"]);
        } else if (name == "Reconcile") {
            engine().kept(sent["handles"]);
        }
    }

    json report(const string &rpc_name, const string &pool) {
        return find_rpc(rpc_name)(client_, {{"name", pool}});
    }

    /* The books of the scenario's pool, without clocks and counters. */
    json books() {
        if (!names_.count("$pool") || names_["$pool"].is_null()) return nullptr;
        const string name = names_["$pool"]["name"];
        json told = report("GetPool", name);
        const json summary = told["summary"];
        told.erase("summary");
        told.erase("counters");
        return {told, summary["pool"], summary["free_tokens"], report("ListRegions", name)};
    }

    /* Insist that every engine and the service believe the same. */
    void agree() {
        for (const auto &[name, engine] : engines_) {
            engine.check();
            const json told = report("GetPool", name), listed = report("ListRegions", name);
            std::map<uint64_t, std::pair<uint32_t, uint32_t>> live, believed;
            uint64_t held = 0, waiting = 0;
            for (const json &region : listed["regions"]) {
                const json &place = region["place"];
                const bool kept_waits = region["state"] == "REGION_STATE_KEPT" &&
                                        region["awaits_seq"] > told["completed_seq"];
                if (region["state"] == "REGION_STATE_LIVE")
                    live[place["handle"]] = {place["start_token"], place["length_tokens"]};
                else if (kept_waits || region["state"] == "REGION_STATE_AWAITING_COMPLETION")
                    waiting += place["length_tokens"].get<uint64_t>();
            }
            for (const auto &[handle, one] : engine.regions) {
                believed[handle] = {one.start, one.length};
                held += one.length - one.shared;
            }
            insist(live == believed, "the books have other places than the engine");
            insist(told["awaiting_completion_tokens"] == waiting,
                   "the books contradict themselves about what waits");
            insist(told["summary"]["free_tokens"] == engine.capacity - held - waiting,
                   "the books do not balance");
        }
    }

    odma::Client &client_;
    const json &script_;
    Names names_;
    std::map<string, Engine> engines_; /* by pool, each of the latest epoch */
    std::map<string, odma::Stream> streams_;
};

int main(int argc, char **argv) {
    if (argc < 3) {
        std::fprintf(stderr, "usage: %s SCENARIOS.JSON TARGET [PART OF A NAME]\n", argv[0]);
        return 2;
    }
    std::ifstream file(argv[1]);
    const json script = json::parse(file);
    odma::Client client(argv[2]);
    int failed = 0;
    for (const json &scenario : script["scenarios"]) {
        const string name = scenario["name"];
        if (argc > 3 && name.find(argv[3]) == string::npos) continue;
        Player player(client, script);
        try {
            player.play(scenario["steps"]);
            std::printf("ok      %s\n", name.c_str());
        } catch (const Failure &failure) {
            failed++;
            std::printf("FAILED  %s\n        %s\n", name.c_str(), failure.what());
        }
        player.close();
    }
    if (failed) std::printf("%d scenarios failed\n", failed);
    else std::printf("all scenarios hold\n");
    return failed > 0;
}
