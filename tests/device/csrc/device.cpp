// A device of torch that is not the CPU, for tests: PrivateUse1, renamed "sim". Its memory is the host's, its operators the CPU's.
//
// Every operator without a kernel below comes to `fallback`: tensors of the device are seen as CPU tensors over the same bytes
// (nothing is copied), the CPU's kernel runs, and what it made becomes the device's. Devices are checked as CUDA checks them,
// and everything a real device would make the host wait for is counted. Order and time are `runtime.h`'s.
#include "runtime.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_indices_native.h>
#include <ATen/ops/_nnz_native.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors_native.h>
#include <ATen/ops/_values_native.h>
#include <ATen/ops/clone_native.h>
#include <ATen/ops/dense_dim_native.h>
#include <ATen/ops/indices_native.h>
#include <ATen/ops/is_coalesced_native.h>
#include <ATen/ops/sparse_dim_native.h>
#include <ATen/ops/values_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include "older.h"

namespace {

using at::IValue;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using sim::Block;
using sim::Runtime;
using sim::Touch;

constexpr auto kSim = c10::DeviceType::PrivateUse1;
constexpr int64_t kTotalBytes = 8LL << 30;

Runtime& runtime() { return Runtime::get(); }

// ------------------------------------------------------------------------------------------------------ devices and streams

thread_local DeviceIndex current_device = 0;
thread_local int64_t current_streams[sim::kDevices] = {};

int number_of(c10::Stream stream) { return runtime().stream_of(stream.device_index(), stream.id()); }

DeviceIndex index_of(Device device) { return device.has_index() ? device.index() : current_device; }

c10::Stream current_stream(DeviceIndex device) {
  return c10::Stream(c10::Stream::UNSAFE, Device(kSim, device), current_streams[device]);
}

int current_number(DeviceIndex device) { return number_of(current_stream(device)); }

void check_index(DeviceIndex device) {
  TORCH_CHECK(device >= 0 && device < sim::kDevices, "sim error: invalid device ordinal ", static_cast<int>(device));
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  Device exchangeDevice(Device device) const override {
    Device before(kSim, current_device);
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(kSim, current_device); }
  void setDevice(Device device) const override {
    check_index(device.index());
    current_device = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = device.index(); }
  c10::Stream getStream(Device device) const noexcept override { return current_stream(index_of(device)); }
  c10::Stream getDefaultStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, Device(kSim, index_of(device)));
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device); }
  c10::Stream getNewStream(Device device, int = 0) const override {
    return c10::Stream(c10::Stream::UNSAFE, Device(kSim, index_of(device)), runtime().new_stream_id());
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    auto before = current_stream(stream.device_index());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return sim::kDevices; }

  static sim::EventState& state(void* event) { return *static_cast<sim::EventState*>(event); }
  void record(void** event, const c10::Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new sim::EventState();
    state(*event) = runtime().record(number_of(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event == nullptr || state(event).stream == number_of(stream) || runtime().is_skipped("stream.wait")) return;
    runtime().block_on(state(event), number_of(stream));
  }
  bool queryEvent(void* event) const override { return event == nullptr || runtime().is_done(state(event)); }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<sim::EventState*>(event); }
  void synchronizeEvent(void* event) const override {
    if (event == nullptr || runtime().is_skipped("event.synchronize")) return;
    runtime().sync(state(event).stream, state(event).place, state(event).clock, "event.synchronize");
  }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0.01; }
  bool queryStream(const c10::Stream& stream) const override { return runtime().is_done(runtime().record(number_of(stream))); }
  void synchronizeStream(const c10::Stream& stream) const override {
    if (!runtime().is_skipped("stream.synchronize")) runtime().sync_stream(number_of(stream), "stream.synchronize");
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    if (!runtime().is_skipped("device.synchronize")) runtime().sync_device(device, "device.synchronize");
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override;
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// -------------------------------------------------------------------------------------------------------------------- memory

// What a storage of the device keeps alive. Work that is queued keeps the block alive too, but not allocated.
struct Held {
  std::shared_ptr<Block> block;
};

void let_go(void* context) {
  auto* held = static_cast<Held*>(context);
  runtime().free_block(held->block);
  delete held;
}

c10::DataPtr hold(void* data, size_t nbytes, std::shared_ptr<void> memory, DeviceIndex device) {
  auto block = runtime().make_block(device, current_number(device), nbytes, std::move(memory));
  return c10::DataPtr(data, new Held{std::move(block)}, let_go, Device(kSim, device));
}

std::shared_ptr<Block> block_of(const c10::DataPtr& data) {
  return data.get_deleter() == let_go ? static_cast<Held*>(data.get_context())->block : nullptr;
}

void Guard::recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const {
  auto block = block_of(data);
  if (block && !runtime().is_skipped("record_stream")) runtime().record_on(block, number_of(stream));
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t nbytes) override { return allocate_on(nbytes, current_device); }
  c10::DataPtr allocate_on(size_t nbytes, DeviceIndex device) {
    auto& m = runtime().memory[device];
    TORCH_CHECK_WITH(OutOfMemoryError, m.allocated + static_cast<int64_t>(nbytes) <= kTotalBytes, "sim out of memory. Tried to allocate ",
                     nbytes, " bytes");
    if (nbytes == 0) return c10::DataPtr(nullptr, Device(kSim, device));
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 64, (nbytes + 63) / 64 * 64) == 0, "sim out of host memory");
    std::memset(data, 0xFF, nbytes);  // NaN in every float dtype
    return hold(data, nbytes, std::shared_ptr<void>(data, free), device);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t nbytes) const override { std::memcpy(to, from, nbytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {}
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override { Guard().recordDataPtrOnStream(data, stream); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    auto& m = runtime().memory[device];
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* bytes : {&stats.allocated_bytes[0], &stats.reserved_bytes[0]}) {
      bytes->current = m.allocated;
      bytes->peak = m.peak;
      bytes->allocated = m.total;
    }
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex device) override { runtime().memory[device].total = 0; }
  void resetPeakStats(DeviceIndex device) override { runtime().memory[device].peak = runtime().memory[device].allocated; }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    return {kTotalBytes - runtime().memory[device].allocated, kTotalBytes};
  }
};

Allocator& allocator() {
  static auto* it = new Allocator();
  return *it;
}

// Page-locked memory of the host: which ranges are.
struct Pinned final : at::Allocator {
  std::mutex mutex;
  std::map<uintptr_t, size_t> ranges;

  static Pinned& get() {
    static auto* it = new Pinned();
    return *it;
  }
  static void release(void* data) {
    std::lock_guard<std::mutex> lock(get().mutex);
    get().ranges.erase(reinterpret_cast<uintptr_t>(data));
    std::free(data);
  }
  c10::DataPtr allocate(size_t nbytes) override {
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 64, std::max<size_t>(nbytes, 64)) == 0, "out of host memory");
    std::memset(data, 0xFF, nbytes);
    std::lock_guard<std::mutex> lock(mutex);
    ranges[reinterpret_cast<uintptr_t>(data)] = nbytes;
    return c10::DataPtr(data, data, release, c10::kCPU);
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* to, const void* from, std::size_t nbytes) const override { std::memcpy(to, from, nbytes); }
  bool has(const void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    auto at = reinterpret_cast<uintptr_t>(data);
    auto next = ranges.upper_bound(at);
    return next != ranges.begin() && at < std::prev(next)->first + std::max<size_t>(std::prev(next)->second, 1);
  }
};

// ------------------------------------------------------------------------------------------------------------ random numbers

// A generator of the device: a CPU generator behind it draws.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(DeviceIndex device)
      : GeneratorImpl(Device(kSim, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), cpu(at::detail::createCPUGenerator()) {}
  at::Generator cpu;
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  static c10::DeviceType device_type() { return kSim; }

 private:
  Generator* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->cpu = cpu.clone();
    return copy;
  }
};

const at::Generator& default_generator(DeviceIndex device) {
  static auto* all = [] {
    auto* made = new std::vector<at::Generator>();
    for (int i = 0; i < sim::kDevices; i++) made->push_back(at::make_generator<Generator>(static_cast<DeviceIndex>(i)));
    return made;
  }();
  return (*all)[device < 0 ? current_device : device];
}

at::Generator& drawn_by(const at::Generator& generator) { return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->cpu; }

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<Generator>(device < 0 ? current_device : device);
  }
  Device getDeviceFromPtr(void*) const override { return Device(kSim, current_device); }
  bool isPinnedPtr(const void* data) const override { return Pinned::get().has(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &Pinned::get(); }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return sim::kDevices; }
  void setCurrentDevice(DeviceIndex device) const override { Guard().setDevice(Device(kSim, device)); }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return Guard().exchangeDevice(Device(kSim, device)).index(); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    auto data = allocator().allocate_on(nbytes, storage.device().index());
    auto old = block_of(storage.data_ptr());
    size_t kept = std::min(nbytes, storage.nbytes());
    if (kept && old != nullptr) {
      auto to = block_of(data);
      int number = current_number(storage.device().index());
      void* target = data.mutable_get();
      const void* source = storage.data();
      int64_t length = static_cast<int64_t>(kept);
      runtime().launch(number, "resize_", {{old, 0, length, false}, {to, 0, length, true}},
                       [=] { std::memcpy(target, source, kept); }, true);
    }
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(nbytes);
  }
};

// ------------------------------------------------------------------------------------------------------- seeing sim as CPU

bool is_sim(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kSim; }

std::pair<int64_t, int64_t> extent(const Tensor& tensor) {
  if (tensor.numel() == 0) return {0, 0};
  int64_t first = tensor.storage_offset(), last = first;
  for (int64_t d = 0; d < tensor.dim(); d++) last += (tensor.size(d) - 1) * tensor.stride(d);
  int64_t unit = static_cast<int64_t>(tensor.itemsize());
  return {first * unit, (last + 1) * unit};
}

// Whether a tensor's bytes are there: memory that was given up may be seen, but not read or written.
bool is_there(const Tensor& tensor) { return extent(tensor).second <= static_cast<int64_t>(tensor.storage().nbytes()); }

void check_there(const char* op, const Tensor& tensor) {
  TORCH_CHECK(is_there(tensor), "sim error: ", op, " of a tensor of shape ", tensor.sizes(), " whose memory was given up: its storage has ",
              tensor.storage().nbytes(), " bytes");
}

void touch(std::vector<Touch>& touches, const Tensor& tensor, bool is_write) {
  auto block = block_of(tensor.storage().data_ptr());
  auto [begin, end] = extent(tensor);
  if (block != nullptr && begin < end) touches.push_back(Touch{std::move(block), begin, end, is_write});
}

// The CPU tensors of one call, over the bytes of the device's. Tensors that share a storage still do.
class Aliases {
 public:
  Tensor of(const Tensor& tensor) {
    auto* key = tensor.storage().unsafeGetStorageImpl();
    auto found = storages_.find(key);
    if (found == storages_.end()) {
      auto block = block_of(tensor.storage().data_ptr());
      auto* kept = new std::shared_ptr<Block>(std::move(block));
      c10::DataPtr data(const_cast<void*>(tensor.storage().data()), kept,
                        [](void* context) { delete static_cast<std::shared_ptr<Block>*>(context); }, c10::kCPU);
      c10::Storage storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(data), nullptr, false);
      found = storages_.emplace(key, std::make_pair(storage, tensor)).first;
    }
    auto alias = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(found->second.first), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                          tensor.dtype());
    alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.is_conj()) alias._set_conj(true);
    if (tensor.is_neg()) alias._set_neg(true);
    return alias;
  }

  // The device's tensor whose bytes a result shares; undefined where it has its own.
  Tensor source_of(const Tensor& result) const {
    for (const auto& [key, pair] : storages_)
      if (pair.first.unsafeGetStorageImpl() == result.storage().unsafeGetStorageImpl()) return pair.second;
    return Tensor();
  }

 private:
  std::unordered_map<c10::StorageImpl*, std::pair<c10::Storage, Tensor>> storages_;
};

Tensor on_storage(const Tensor& cpu, c10::Storage storage) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), cpu.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  return made;
}

// A result that the CPU's kernel allocated becomes the device's, without a copy.
Tensor adopt(const Tensor& cpu, DeviceIndex device) {
  if (!cpu.defined() || cpu.device().type() != c10::kCPU) return cpu;
  auto keep = std::make_shared<c10::Storage>(cpu.storage());
  size_t nbytes = cpu.storage().nbytes();
  auto data = nbytes ? hold(const_cast<void*>(cpu.storage().data()), nbytes, keep, device) : c10::DataPtr(nullptr, Device(kSim, device));
  return on_storage(cpu, c10::Storage(c10::Storage::use_byte_size_t(), nbytes, std::move(data), &allocator(), true));
}

// Autograd, autocast and Python were above us already, and are not to see what runs below.
struct Below {
  at::AutoDispatchBelowADInplaceOrView no_grad;
  c10::impl::ExcludeDispatchKeyGuard no_more{c10::autocast_dispatch_keyset | c10::DispatchKeySet(c10::DispatchKey::Python) |
                                             c10::DispatchKeySet(c10::DispatchKey::PythonTLSSnapshot)};
};

// ---------------------------------------------------------------------------------------------------------------- the fallback

const std::set<std::string> kDataDependent = {"aten::nonzero",        "aten::masked_select",     "aten::_unique",
                                              "aten::_unique2",       "aten::unique_dim",       "aten::unique_consecutive",
                                              "aten::bincount",       "aten::repeat_interleave", "aten::unique_dim_consecutive"};

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), schema_(op.schema()), stack_(stack), name_(schema_.name().c_str()), first_(stack->size() - schema_.arguments().size()) {
    find_device();
  }

  void run() {
    for (size_t i = 0; i < schema_.arguments().size(); i++) convert(i);
    if (is_metadata_only()) return make_views();
    for (const Tensor& tensor : used_) check_there(name_, tensor);
    bool makes_new = has_sync_ || resized_.defined();
    for (const auto& returned : schema_.returns())
      if (returned.alias_info() == nullptr || !returned.alias_info()->isWrite()) makes_new = true;
    bool asks_host = has_sync_ || (kDataDependent.count(name_) && !knows_size()) || returns_host_value();
    int number = stream_ = current_number(device_);
    auto arguments = std::make_shared<torch::jit::Stack>(std::move(converted_));
    auto op = op_;
    place_ = runtime().launch(number, name_, touches_, [op, arguments] {
      Below below;
      op.callBoxed(arguments.get());
    }, makes_new);
    if (asks_host) runtime().sync_stream(number, name_);
    if (makes_new) return give_results(*arguments);
    give_written();
  }

 private:
  const IValue& argument(size_t i) const { return (*stack_)[first_ + i]; }

  // repeat_interleave with output_size need not ask the device how much comes.
  bool knows_size() const {
    for (size_t i = 0; i < schema_.arguments().size(); i++)
      if (schema_.arguments()[i].name() == "output_size" && !argument(i).isNone()) return true;
    return false;
  }

  void find_device() {
    bool found = false;
    auto see = [&](const Tensor& tensor) {
      if (!is_sim(tensor)) return;
      if (!found) device_ = tensor.device().index();
      TORCH_CHECK(tensor.device().index() == device_, "Expected all tensors to be on the same device, but found at least two devices, sim:",
                  static_cast<int>(device_), " and ", tensor.device(), "! (when checking argument in ", name_, ")");
      found = true;
    };
    for (size_t i = 0; i < schema_.arguments().size(); i++) {
      const IValue& value = argument(i);
      if (value.isTensor()) see(value.toTensor());
      if (value.isTensorList())
        for (const Tensor& tensor : value.toTensorVector()) see(tensor);
      if (value.isList() && !value.isTensorList())
        for (const IValue& item : value.toListRef())
          if (item.isTensor()) see(item.toTensor());
      if (!found && value.isDevice() && value.toDevice().type() == kSim) device_ = index_of(value.toDevice());
    }
    if (!found && device_ < 0) device_ = current_device;
  }

  Tensor convert(const Tensor& tensor, bool is_write, bool is_index) {
    if (!tensor.defined()) return tensor;
    if (is_sim(tensor)) {
      touch(touches_, tensor, is_write);
      used_.push_back(tensor);
      return aliases_.of(tensor);
    }
    if (tensor.device().type() == c10::kCPU && is_index) {
      has_sync_ = true;  // indices are copied to the device
      return tensor;
    }
    TORCH_CHECK(tensor.device().type() == c10::kCPU && tensor.dim() == 0 && !is_write,
                "Expected all tensors to be on the same device, but found at least two devices, sim:", static_cast<int>(device_), " and ",
                tensor.device(), "! (when checking argument in ", name_, ")");
    return tensor;
  }

  void convert(size_t i) {
    const auto& declared = schema_.arguments()[i];
    bool is_write = declared.alias_info() != nullptr && declared.alias_info()->isWrite();
    bool is_index = declared.name() == "indices";
    const IValue& value = argument(i);
    if (value.isTensor()) {
      Tensor tensor = value.toTensor();
      if (is_write && declared.kwarg_only() && is_sim(tensor) && tensor.numel() == 0) {
        resized_ = tensor;
        converted_.emplace_back(at::empty({0}, tensor.options().device(c10::kCPU)));
        return;
      }
      converted_.emplace_back(convert(tensor, is_write, is_index));
    } else if (value.isTensorList()) {
      std::vector<Tensor> tensors;
      for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(convert(tensor, is_write, is_index));
      converted_.emplace_back(std::move(tensors));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> tensors;
      for (std::optional<Tensor> tensor : value.toOptionalTensorList())
        tensors.push_back(tensor.has_value() ? std::optional<Tensor>(convert(*tensor, is_write, is_index)) : std::nullopt);
      converted_.emplace_back(std::move(tensors));
    } else if (value.isDevice() && value.toDevice().type() == kSim) {
      converted_.emplace_back(Device(c10::kCPU));
    } else if (value.isGenerator()) {
      const auto& generator = value.toGenerator();
      TORCH_CHECK(generator.device().type() == kSim, "Expected a 'sim' device type for generator but found '", generator.device().type(), "'");
      converted_.emplace_back(drawn_by(generator));
    } else if (value.isNone() && declared.name() == "generator") {
      converted_.emplace_back(drawn_by(default_generator(device_)));
    } else {
      converted_.push_back(value);
    }
  }

  bool returns_host_value() const {
    for (const auto& returned : schema_.returns()) {
      auto kind = returned.type()->kind();
      if (kind == c10::TypeKind::BoolType || kind == c10::TypeKind::NumberType || kind == c10::TypeKind::IntType ||
          kind == c10::TypeKind::FloatType)
        return true;
    }
    return false;
  }

  // A view: every result shares bytes with an argument, and nothing is written.
  bool is_metadata_only() const {
    if (schema_.returns().empty()) return false;
    for (const auto& returned : schema_.returns())
      if (returned.alias_info() == nullptr || returned.alias_info()->isWrite()) return false;
    return true;
  }

  void make_views() {
    {
      Below below;
      op_.callBoxed(&converted_);
    }
    give_results(converted_);
  }

  Tensor give(const Tensor& result) {
    if (!result.defined()) return result;
    Tensor source = aliases_.source_of(result);
    if (!source.defined()) {
      Tensor made = adopt(result, device_);
      auto block = block_of(made.storage().data_ptr());
      if (block && place_ > 0) runtime().made(block, stream_, place_, name_);
      return made;
    }
    return on_storage(result, c10::Storage(source.storage()));
  }

  void give_results(torch::jit::Stack& results) {
    std::vector<IValue> written = written_arguments();
    stack_->erase(stack_->begin() + static_cast<int64_t>(first_), stack_->end());
    for (size_t i = 0; i < schema_.returns().size(); i++) {
      const auto* alias = schema_.returns()[i].alias_info();
      IValue& result = results[i];
      if (alias != nullptr && alias->isWrite()) {
        if (resized_.defined() && result.isTensor()) fill_resized(result.toTensor());
        stack_->push_back(written.size() > i ? written[i] : written.at(0));
      } else if (result.isTensor()) {
        stack_->emplace_back(give(result.toTensor()));
      } else if (result.isTensorList()) {
        std::vector<Tensor> tensors;
        for (const Tensor& tensor : result.toTensorVector()) tensors.push_back(give(tensor));
        stack_->emplace_back(std::move(tensors));
      } else {
        stack_->push_back(result);
      }
    }
  }

  void fill_resized(const Tensor& result) {
    resized_.resize_(result.sizes());
    if (result.numel()) std::memcpy(resized_.mutable_data_ptr(), result.contiguous().const_data_ptr(), result.nbytes());
  }

  // The arguments that are written, in their order: what in-place and out= variants return.
  std::vector<IValue> written_arguments() const {
    std::vector<IValue> written;
    for (size_t i = 0; i < schema_.arguments().size(); i++) {
      const auto* alias = schema_.arguments()[i].alias_info();
      if (alias != nullptr && alias->isWrite()) written.push_back(argument(i));
    }
    return written;
  }

  void give_written() {
    std::vector<IValue> written = written_arguments();
    size_t count = schema_.returns().size();
    stack_->erase(stack_->begin() + static_cast<int64_t>(first_), stack_->end());
    for (size_t i = 0; i < count; i++) stack_->push_back(written.at(i));
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  torch::jit::Stack* stack_;
  const char* name_;
  size_t first_;
  DeviceIndex device_ = -1;
  int stream_ = 0;
  int64_t place_ = 0;  // of the work; 0: a view, which is none
  bool has_sync_ = false;
  Tensor resized_;
  Aliases aliases_;
  std::vector<Touch> touches_;
  std::vector<Tensor> used_;
  torch::jit::Stack converted_;
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

// ------------------------------------------------------------------------------------------------------------- own kernels

Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  DeviceIndex index = device.has_value() ? index_of(*device) : current_device;
  check_index(index);
  c10::DeviceGuard guard(Device(kSim, index));
  return at::detail::empty_strided_generic(sizes, strides, &allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  DeviceIndex index = device.has_value() ? index_of(*device) : current_device;
  check_index(index);
  c10::DeviceGuard guard(Device(kSim, index));
  return at::detail::empty_generic(sizes, &allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  size_t needed = (static_cast<size_t>(self.storage_offset()) + static_cast<size_t>(self.numel())) * self.itemsize();
  if (self.numel() && needed > self.storage().nbytes())
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), needed);
  return self;
}

Tensor& set_(Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return self;
}

Tensor& set_whole(Tensor& self, at::Storage source) {
  int64_t numel = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_(self, std::move(source), 0, {numel}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor view_as_cpu(Aliases& aliases, const Tensor& tensor) { return is_sim(tensor) ? aliases.of(tensor) : tensor; }

bool is_pinned(const Tensor& cpu) { return Pinned::get().has(cpu.storage().data()); }

// The host's memory that queued copies are still to read or write: it must not be poisoned.
struct HostUses {
  std::mutex mutex;
  std::multiset<std::pair<const void*, const void*>> ranges;

  static HostUses& get() {
    static auto* it = new HostUses();
    return *it;
  }
  static std::pair<const void*, const void*> range(const Tensor& cpu) {
    const char* first = static_cast<const char*>(cpu.storage().data());
    return {first, first + cpu.storage().nbytes()};
  }
  bool has(const Tensor& cpu) {
    std::lock_guard<std::mutex> lock(mutex);
    auto mine = range(cpu);
    return std::any_of(ranges.begin(), ranges.end(), [&](auto& r) { return r.first < mine.second && mine.first < r.second; });
  }
  void add(const Tensor& cpu) {
    std::lock_guard<std::mutex> lock(mutex);
    ranges.insert(range(cpu));
  }
  void remove(const Tensor& cpu) {
    std::lock_guard<std::mutex> lock(mutex);
    ranges.erase(ranges.find(range(cpu)));
  }
};

void poison(const Tensor& cpu) {
  if (!cpu.numel()) return;
  Below below;
  Tensor written = cpu;
  if (written.is_floating_point()) written.fill_(std::numeric_limits<double>::quiet_NaN());
  else if (written.scalar_type() != at::kBool) written.fill_(0x55);
}

// Copies within the device, and between it and the host. As on CUDA the host waits, unless the copy is non_blocking and the host's
// side is pinned: then it must keep its hands off until it has synchronised.
void copy_bytes(const Tensor& to, const Tensor& from, bool non_blocking) {
  Aliases aliases;
  std::vector<Touch> touches;
  DeviceIndex device = is_sim(to) ? to.device().index() : from.device().index();
  bool is_inside = is_sim(to) && is_sim(from);
  const char* name = is_inside ? "copy_" : is_sim(to) ? "copy_ from the host" : "copy_ to the host";
  for (const Tensor& tensor : {to, from})
    if (is_sim(tensor)) check_there(name, tensor);
  if (is_sim(from)) touch(touches, from, false);
  if (is_sim(to)) touch(touches, to, true);
  Tensor target = view_as_cpu(aliases, to), source = view_as_cpu(aliases, from);
  int number = current_number(device);
  const Tensor& host = is_sim(to) ? from : to;
  bool is_waited = !is_inside && !(non_blocking && is_pinned(host));
  bool is_tracked = !is_inside && !is_waited;
  if (is_tracked && !is_sim(to) && runtime().is_deferring() && !HostUses::get().has(host)) poison(host);
  if (is_tracked) HostUses::get().add(host);
  runtime().launch(number, name, touches, [target, source, host, is_tracked] {
    Below below;
    const_cast<Tensor&>(target).copy_(source);
    if (is_tracked) HostUses::get().remove(host);
  }, is_waited);
  if (is_waited) runtime().sync_stream(number, is_sim(to) ? "copy_ from pageable memory or blocking" : "copy_ to the host");
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (to.numel()) copy_bytes(to, from, non_blocking);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) const_cast<Tensor&>(to).resize_(from.sizes());
  return copy_from(from, to, false);
}

// As on CUDA: one piece of work where all tensors are on one device, else copy by copy.
void foreach_copy_(at::TensorList to, at::TensorList from, bool non_blocking) {
  TORCH_CHECK(to.size() == from.size(), "_foreach_copy_ needs lists of one length");
  bool is_inside = std::all_of(from.begin(), from.end(), [&](const Tensor& t) { return t.device() == to[0].device(); });
  if (!is_inside) {
    for (size_t i = 0; i < to.size(); i++) const_cast<Tensor&>(to[i]).copy_(from[i], non_blocking);
    return;
  }
  Aliases aliases;
  std::vector<Touch> touches;
  std::vector<Tensor> targets, sources;
  for (size_t i = 0; i < to.size(); i++) {
    touch(touches, from[i], false);
    touch(touches, to[i], true);
    targets.push_back(aliases.of(to[i]));
    sources.push_back(aliases.of(from[i]));
  }
  runtime().launch(current_number(to[0].device().index()), "_foreach_copy_", touches, [targets, sources] {
    Below below;
    for (size_t i = 0; i < targets.size(); i++) const_cast<Tensor&>(targets[i]).copy_(sources[i]);
  }, false);
}

// Whether `param.data = x` may take a tensor of the other device: as between the CPU and any of torch's own.
bool may_take(const Tensor& self, const Tensor& from) {
  auto is_dense = [](const Tensor& t) {
    return t.key_set().has_any(c10::DispatchKeySet(c10::DispatchKey::Dense)) && t.layout() == at::kStrided;
  };
  return self.key_set() == from.key_set() || (is_dense(self) && is_dense(from));
}

at::Scalar local_scalar(const Tensor& self) {
  std::vector<Touch> touches;
  touch(touches, self, false);
  Aliases aliases;
  Tensor cpu = aliases.of(self);
  at::Scalar value;
  int number = current_number(self.device().index());
  runtime().launch(number, "item", touches, [&] {
    Below below;
    value = cpu.item();
  }, true);
  runtime().sync_stream(number, "item");
  return value;
}

void record_stream(Tensor& self, c10::Stream stream) {
  Guard().recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

// The CPU's own attention, so that sums are made in the same order.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double dropout, bool is_causal,
                 std::optional<double> scale, bool enable_gqa) {
  if (dropout > 0 || enable_gqa || query.dim() != 4)
    return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, mask, dropout, is_causal, std::nullopt, scale, enable_gqa));
  std::optional<Tensor> bias = mask;
  if (mask.has_value() && mask->scalar_type() == at::kBool)
    bias = at::zeros_like(*mask, query.options()).masked_fill_(mask->logical_not(), -std::numeric_limits<double>::infinity());
  return std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout, is_causal, bias, scale));
}

// Work of Python on the current stream, which reads and writes these tensors: `host_work_of(key)`, when its time has come, and not
// before `host_ready_of(key)` unless somebody waits for it. What is written is poison until then.
void (*host_work_of)(int64_t) = nullptr;
int (*host_ready_of)(int64_t) = nullptr;

void host_work(at::TensorList reads, at::TensorList writes, std::string name, int64_t key) {
  std::vector<Touch> touches;
  DeviceIndex device = current_device;
  for (const auto& tensor : reads) touch(touches, tensor, false);
  for (const auto& tensor : writes) {
    touch(touches, tensor, true);
    device = tensor.device().index();
    if (runtime().is_deferring()) poison(Aliases().of(tensor));
  }
  static std::set<std::string> names;  // for the life of the process: accesses point to them
  const char* kept = names.insert(std::move(name)).first->c_str();
  runtime().launch(current_number(device), kept, touches, [key] { host_work_of(key); }, false, true,
                   [key] { return host_ready_of(key) != 0; });
}

// A CPU tensor over the same bytes, for Python to work on when their time has come.
Tensor as_cpu(const Tensor& self) {
  Aliases aliases;
  return aliases.of(self);
}

TORCH_LIBRARY(sim, m) {
  m.def("host_work(Tensor[] reads, Tensor[] writes, str name, int key) -> ()", host_work);
  m.def("as_cpu(Tensor self) -> Tensor", as_cpu);
  m.def("default_generator(int device) -> Generator?",
        [](int64_t device) { return std::optional<at::Generator>(default_generator(static_cast<DeviceIndex>(device))); });
  m.def("default_stream(int device) -> Stream", [](int64_t device) {
    return c10::Stream(c10::Stream::DEFAULT, Device(kSim, static_cast<DeviceIndex>(device)));
  });
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_foreach_copy_", foreach_copy_);
  m.impl("_has_compatible_shallow_copy_type", may_take);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("record_stream", record_stream);
}

// Sparse gradients of tables: rows by their numbers, added up in their order, as the CPU does it.
Tensor to_dense(const Tensor& self, std::optional<at::ScalarType> dtype, std::optional<bool>) {
  TORCH_CHECK(self.sparse_dim() == 1, "sim: only rows of a table are made dense");
  Tensor dense = at::zeros(self.sizes(), self._values().options().dtype(dtype.value_or(self.scalar_type())));
  return dense.index_add_(0, self._indices()[0], self._values().to(dense.scalar_type()));
}

TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, m) {
  m.impl("_sparse_coo_tensor_with_dims_and_tensors", at::native::new_with_dims_and_tensor_sparse_symint);
  m.impl("sparse_dim", at::native::sparse_dim_sparse);
  m.impl("dense_dim", at::native::dense_dim_sparse);
  m.impl("_nnz", at::native::_nnz_sparse);
  m.impl("is_coalesced", at::native::is_coalesced_sparse);
  m.impl("_indices", at::native::_indices_sparse);
  m.impl("_values", at::native::_values_sparse);
  m.impl("indices", at::native::indices_sparse);
  m.impl("values", at::native::values_sparse);
  m.impl("clone", at::native::clone_sparse);
  m.impl("_to_dense", to_dense);
}

// Operators that torch would make of others for a device without a kernel (a sum into new memory and a copy back for `add_`, one
// call per tensor for `_foreach_add_`) are one piece of work on real devices, and here.
void register_kernels() {
  static auto* kept = new std::vector<c10::RegistrationHandleRAII>();
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findOp(name);
    if (!op.has_value() || !op->hasSchema() || op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) continue;
    bool is_made_of_others = op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional) ||
                             op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd);
    bool is_foreach = name.name.rfind("aten::_foreach_", 0) == 0;
    if (name.name.rfind("aten::", 0) != 0 || !(is_made_of_others || is_foreach)) continue;
    if (!op->hasKernelForDispatchKey(c10::DispatchKey::CPU) && !is_foreach) continue;
    kept->push_back(dispatcher.registerImpl(name, c10::DispatchKey::PrivateUse1, c10::KernelFunction::makeFromBoxedFunction<&fallback>(),
                                            std::nullopt, nullptr, "simulated device"));
  }
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { m.impl("scaled_dot_product_attention", attention); }

#ifdef SIM_WITHOUT_DEVICE_ALLOCATOR
// Such a torch looks for no kernel of a device behind this one's Autograd key, and finds its own there, which knows no PrivateUse1.
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { m.impl("_has_compatible_shallow_copy_type", may_take); }
#endif

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

// Autocast's choices are the CPU's, whose bits results are compared with: what is not a product or a loss keeps its dtype.
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mse_loss, fp32)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
  KERNEL_PRIVATEUSEONE(nll_loss, fp32)
  KERNEL_PRIVATEUSEONE(cat, promote)
  KERNEL_PRIVATEUSEONE(stack, promote)
}

}  // namespace

// ------------------------------------------------------------------------------------------------------- for Python's ctypes

extern "C" {

void sim_install() {
  c10::register_privateuse1_backend("sim");
  c10::SetAllocator(kSim, &allocator());
  static auto* hooks = new Hooks();
  at::RegisterPrivateUse1HooksInterface(hooks);
  register_kernels();
}

void sim_reset(int64_t seed) { runtime().reset(seed); }
void sim_listen(sim::Runtime::Listener listener) { runtime().listener = listener; }
void sim_skip(sim::Runtime::Skipper skipper) { runtime().skipper = skipper; }
int64_t sim_counter(int which) {
  auto& c = runtime().counters;
  const int64_t all[] = {c.host_syncs, c.launches, c.deferred, c.races};
  return all[which];
}

// Bytes of a device's memory: allocated, at most, in all, and what there is.
int64_t sim_memory(int device, int which) {
  auto& m = runtime().memory[device];
  const int64_t all[] = {m.allocated, m.peak, m.total, kTotalBytes};
  return all[which];
}
void sim_reset_peak(int device) { allocator().resetPeakStats(static_cast<DeviceIndex>(device)); }

// The text of a race that was found where nothing could be raised (a tensor's end), or "".
const char* sim_failure() {
  static thread_local std::string text;
  text = runtime().take_failure();
  return text.c_str();
}

void sim_on_work(void (*work)(int64_t), int (*is_ready)(int64_t)) {
  host_work_of = work;
  host_ready_of = is_ready;
}

// Have a stream's queue done up to now, as if time had passed: not a synchronisation of the host.
void sim_drain(int device, int64_t stream) { runtime().drain(runtime().stream_of(device, stream)); }
}
