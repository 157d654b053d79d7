// Streams, events, blocks of memory and time of the simulated device. Plain C++: knows nothing of torch.
//
// A stream is a queue of items (work, or waiting for a place in another stream). What the program may rely on is the *order*:
// vector clocks say for each place of each stream what is finished when it is reached. Work that touches bytes which other,
// unordered work touches is a race, and is told by name when it is queued: it does not have to go wrong to be found.
//
// When items run is another question. Without a seed, at once, but for collectives, which run when somebody waits for them. With
// one, as late as the rules allow, or by a throw of the dice early, ahead of other streams: whatever a real device could do.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace sim {

using Clock = std::vector<int64_t>;  // by number of a stream: how many of its items have finished

inline void join(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size(), 0);
  for (size_t i = 0; i < other.size(); i++) into[i] = std::max(into[i], other[i]);
}

inline bool knows(const Clock& clock, int stream, int64_t place) {
  return stream < static_cast<int>(clock.size()) && clock[stream] >= place;
}

struct Access {
  int stream;
  int64_t place, begin, end;
  bool is_write;
  const char* op;
};

struct Block {
  int64_t id = 0;
  int device = 0;
  int stream = 0;
  size_t nbytes = 0;
  std::vector<Access> accesses;
  std::set<int> recorded;
  std::shared_ptr<void> memory;
};

struct Touch {
  std::shared_ptr<Block> block;
  int64_t begin, end;
  bool is_write;
};

struct Item {
  std::function<void()> work;        // none: wait for `place` of `stream`
  std::function<bool()> is_ready;    // none: always
  int stream = -1;
  int64_t place = 0;
};

struct StreamState {
  int device = 0;
  int64_t id = 0;
  int64_t queued = 0, done = 0;
  Clock clock;
  std::deque<Item> items;
};

struct EventState {
  int stream = -1;
  int64_t place = 0;
  Clock clock;
  double time_ms = 0;
};

struct DeviceMemory {
  int64_t allocated = 0, peak = 0, total = 0, count = 0;
};

struct Counters {
  int64_t host_syncs = 0, launches = 0, deferred = 0, races = 0;
};

constexpr int kDevices = 8;

class Runtime {
 public:
  static Runtime& get() {
    static auto* runtime = new Runtime();
    return *runtime;
  }

  // Called with its reason at each host synchronisation; may be null.
  using Listener = void (*)(const char*);
  Listener listener = nullptr;
  // Called with the kind of each wait that a program asks for; where it gives 1 the wait does nothing. May be null.
  using Skipper = int (*)(const char*);
  Skipper skipper = nullptr;
  bool is_skipped(const char* kind) const { return skipper != nullptr && skipper(kind) != 0; }
  Counters counters;
  DeviceMemory memory[kDevices];

  void reset(int64_t seed) {
    for (int i = 0; i < num_streams(); i++) run(i, queued(i), false);
    std::lock_guard<std::mutex> lock(data_);
    for (auto& stream : streams_) {
      stream->items.clear();
      stream->done = stream->queued;
      join(host_, stream->clock);
    }
    seed_ = seed;
    random_.seed(static_cast<uint64_t>(seed));
    // Each seed has its own temper: from nearly always late to mostly early.
    late_ = seed < 0 ? 0.0 : std::vector<double>{1.0, 0.9, 0.6, 0.3}[seed % 4];
    failures_.clear();
    counters = Counters();
  }

  int num_streams() {
    std::lock_guard<std::mutex> lock(data_);
    return static_cast<int>(streams_.size());
  }

  int64_t queued(int stream) {
    std::lock_guard<std::mutex> lock(data_);
    return streams_[stream]->queued;
  }

  // The number of a device's stream, made when it is first asked for. Id 0 is the default stream.
  int stream_of(int device, int64_t id) {
    std::lock_guard<std::mutex> lock(data_);
    auto found = numbers_.find({device, id});
    if (found != numbers_.end()) return found->second;
    int number = static_cast<int>(streams_.size());
    streams_.push_back(std::make_unique<StreamState>());
    streams_.back()->device = device;
    streams_.back()->id = id;
    numbers_[{device, id}] = number;
    return number;
  }

  int64_t new_stream_id() {
    std::lock_guard<std::mutex> lock(data_);
    return ++last_id_;
  }

  // -- memory

  std::shared_ptr<Block> make_block(int device, int stream, size_t nbytes, std::shared_ptr<void> memory_of) {
    auto block = std::make_shared<Block>();
    block->device = device;
    block->stream = stream;
    block->nbytes = nbytes;
    block->memory = std::move(memory_of);
    std::lock_guard<std::mutex> lock(data_);
    block->id = ++last_block_;
    auto& m = memory[device];
    m.allocated += static_cast<int64_t>(nbytes);
    m.total += static_cast<int64_t>(nbytes);
    m.count++;
    m.peak = std::max(m.peak, m.allocated);
    return block;
  }

  // A tensor's memory goes back to the allocator, which may give it to the next tensor of the block's stream at once.
  void free_block(const std::shared_ptr<Block>& block) {
    std::lock_guard<std::mutex> lock(data_);
    memory[block->device].allocated -= static_cast<int64_t>(block->nbytes);
    Clock here = streams_[block->stream]->clock;
    join(here, host_);
    for (const auto& a : block->accesses) {
      if (a.stream == block->stream || block->recorded.count(a.stream) || knows(here, a.stream, a.place)) continue;
      fail(std::string("race: memory block ") + std::to_string(block->id) + " is freed on " + name(block->stream) + " while " +
           a.op + " on " + name(a.stream) + " may still use it; record_stream or a wait is missing");
      break;
    }
  }

  void record_on(const std::shared_ptr<Block>& block, int stream) {
    std::lock_guard<std::mutex> lock(data_);
    block->recorded.insert(stream);
  }

  // -- work

  // Queue work. It runs now where it must (`is_now`), where there is no seed, or where chance says so. Its place in the stream.
  int64_t launch(int stream, const char* op, const std::vector<Touch>& touches, std::function<void()> work, bool is_now,
              bool is_collective = false, std::function<bool()> is_ready = nullptr) {
    int64_t place;
    bool is_run = is_now;
    {
      std::lock_guard<std::mutex> lock(data_);
      raise_failure();
      counters.launches++;
      StreamState& s = *streams_[stream];
      join(s.clock, host_);
      place = ++s.queued;
      for (const auto& touch : touches) touch_bytes(touch, stream, place, op);
      note(s.clock, stream, place);
      raise_failure();
      s.items.push_back(Item{std::move(work), std::move(is_ready), -1, 0});
      if (!is_now && !is_collective) is_run = !chance(late_);
      if (!is_run) counters.deferred++;
    }
    if (is_run) run(stream, place, false);
    if (seed_ >= 0) stir();
    return place;
  }

  // A new block is what the work at that place has written.
  void made(const std::shared_ptr<Block>& block, int stream, int64_t place, const char* op) {
    std::lock_guard<std::mutex> lock(data_);
    block->accesses.push_back(Access{stream, place, 0, static_cast<int64_t>(block->nbytes), true, op});
  }

  EventState record(int stream) {
    std::lock_guard<std::mutex> lock(data_);
    StreamState& s = *streams_[stream];
    join(s.clock, host_);
    return EventState{stream, s.queued, s.clock, 0};
  }

  // Later work of `stream` comes after the event.
  void block_on(const EventState& event, int stream) {
    std::lock_guard<std::mutex> lock(data_);
    if (event.stream < 0 || event.stream == stream) return;
    StreamState& s = *streams_[stream];
    join(s.clock, event.clock);
    int64_t place = ++s.queued;
    note(s.clock, stream, place);
    s.items.push_back(Item{nullptr, nullptr, event.stream, event.place});
  }

  bool is_done(const EventState& event) {
    if (event.stream < 0) return true;
    progress(event.stream, event.place);
    std::lock_guard<std::mutex> lock(data_);
    bool done = streams_[event.stream]->done >= event.place;
    if (done) join(host_, event.clock);
    return done;
  }

  // As if time had passed: everything that a stream has been asked for is done.
  void drain(int stream) { run(stream, queued(stream), false); }

  // The host waits until a stream has reached a place.
  void sync(int stream, int64_t place, const Clock& clock, const char* why) {
    tell(why);
    run(stream, place, false);
    std::lock_guard<std::mutex> lock(data_);
    join(host_, clock);
    raise_failure();
  }

  void sync_stream(int stream, const char* why) {
    EventState now = record(stream);
    sync(stream, now.place, now.clock, why);
  }

  void sync_device(int device, const char* why) {
    tell(why);
    for (int i = 0; i < num_streams(); i++) {
      EventState now = record(i);
      if (streams_[i]->device != device) continue;
      run(i, now.place, false);
      std::lock_guard<std::mutex> lock(data_);
      join(host_, now.clock);
    }
    std::lock_guard<std::mutex> lock(data_);
    raise_failure();
  }

  void tell(const char* why) {
    counters.host_syncs++;
    if (listener != nullptr) listener(why);
  }

  std::string take_failure() {
    std::lock_guard<std::mutex> lock(data_);
    if (failures_.empty()) return "";
    std::string first = failures_.front();
    failures_.clear();
    return first;
  }

  bool is_deferring() const { return seed_ >= 0; }

 private:
  static void note(Clock& clock, int stream, int64_t place) {
    if (static_cast<int>(clock.size()) <= stream) clock.resize(stream + 1, 0);
    clock[stream] = place;
  }

  std::string name(int stream) {
    const StreamState& s = *streams_[stream];
    return s.id == 0 ? "the default stream" : "stream " + std::to_string(s.id);
  }

  void fail(std::string text) {
    counters.races++;
    failures_.push_back(std::move(text));
  }

  void raise_failure() {
    if (failures_.empty()) return;
    std::string first = failures_.front();
    failures_.clear();
    throw std::runtime_error(first);
  }

  void touch_bytes(const Touch& touch, int stream, int64_t place, const char* op) {
    auto& list = touch.block->accesses;
    const Clock& clock = streams_[stream]->clock;
    bool is_merged = false;
    for (size_t i = 0; i < list.size();) {
      Access& a = list[i];
      bool overlaps = a.begin < touch.end && touch.begin < a.end;
      bool ordered = a.stream == stream || knows(clock, a.stream, a.place);
      if (overlaps && !ordered && (a.is_write || touch.is_write)) {
        fail(std::string("race: ") + op + " on " + name(stream) + (touch.is_write ? " writes" : " reads") + " bytes " +
             std::to_string(std::max(a.begin, touch.begin)) + " to " + std::to_string(std::min(a.end, touch.end)) +
             " of memory block " + std::to_string(touch.block->id) + " that " + a.op + " on " + name(a.stream) +
             (a.is_write ? " writes" : " reads") + ", and nothing orders them");
        return;
      }
      bool covered = touch.begin <= a.begin && a.end <= touch.end;
      if (a.stream == stream && a.is_write == touch.is_write && a.begin == touch.begin && a.end == touch.end) {
        a.place = place;
        a.op = op;
        is_merged = true;
      } else if (covered && ordered && touch.is_write) {
        list[i] = list.back();
        list.pop_back();
        continue;
      }
      i++;
    }
    if (!is_merged) list.push_back(Access{stream, place, touch.begin, touch.end, touch.is_write, op});
  }

  bool chance(double p) { return std::uniform_real_distribution<double>(0, 1)(random_) < p; }

  // Run a stream up to a place, and what it waits for before.
  void run(int stream, int64_t place, bool is_only_ready) {
    std::unique_lock<std::recursive_mutex> turn(turn_, std::defer_lock);
    // Who only asks does not wait for its turn: `query` of torch holds Python's lock, which the work that runs may be waiting for.
    if (!is_only_ready) turn.lock();
    else if (!turn.try_lock()) return;
    while (true) {
      Item item;
      bool is_wait;
      {
        std::unique_lock<std::mutex> lock(data_);
        StreamState& s = *streams_[stream];
        if (s.done >= place || s.items.empty()) return;
        is_wait = !s.items.front().work;
        if (is_only_ready && is_wait && streams_[s.items.front().stream]->done < s.items.front().place) return;
        if (is_only_ready && s.items.front().is_ready) {
          auto is_ready = s.items.front().is_ready;
          lock.unlock();  // it may ask Python, which may be waiting for `data_`
          if (!is_ready()) return;
          lock.lock();
        }
        // A wait stays at the head until what it waits for is done.
        item = is_wait ? s.items.front() : std::move(s.items.front());
        if (!is_wait) s.items.pop_front();
      }
      if (is_wait) run(item.stream, item.place, false);
      if (item.work) item.work();
      std::lock_guard<std::mutex> lock(data_);
      StreamState& s = *streams_[stream];
      if (is_wait) s.items.pop_front();
      s.done++;
    }
  }

  void progress(int stream, int64_t place) { run(stream, place, true); }

  // Now and then let some other stream get on with what it can do without waiting.
  void stir() {
    int stream;
    int64_t place;
    {
      std::lock_guard<std::mutex> lock(data_);
      if (!chance((1.0 - late_) * 0.5)) return;
      stream = static_cast<int>(random_() % streams_.size());
      StreamState& s = *streams_[stream];
      if (s.done >= s.queued) return;
      place = s.done + 1 + static_cast<int64_t>(random_() % static_cast<uint64_t>(s.queued - s.done));
    }
    progress(stream, place);
  }

  std::mutex data_;                  // short, never held while work runs
  std::recursive_mutex turn_;        // held while work runs: one thread at a time
  std::vector<std::unique_ptr<StreamState>> streams_;
  std::map<std::pair<int, int64_t>, int> numbers_;
  Clock host_;
  std::mt19937_64 random_;
  std::vector<std::string> failures_;
  int64_t seed_ = -1, last_id_ = 0, last_block_ = 0;
  double late_ = 0;
};

}  // namespace sim
