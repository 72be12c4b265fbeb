// Makes a CPU build of torch believe that there is a CUDA device 0, for tensors without data (`FakeTensorMode`).
//
// It has no kernels. The guard lets autograd run the backward pass of CUDA tensors, and the hooks let torch choose
// cuDNN and its memory layouts. Without `override`, so that it compiles with versions of torch that lack a method.
// Must be loaded before torch is imported, which asks for the hooks once.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

struct FakeGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Device device() { return {c10::DeviceType::CUDA, 0}; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::DeviceIndex deviceCount() const noexcept { return 1; }
  c10::Device exchangeDevice(c10::Device) const { return device(); }
  c10::Device getDevice() const { return device(); }
  c10::Stream getStream(c10::Device) const noexcept { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const {}
  void block(void*, const c10::Stream&) const {}
  bool queryEvent(void*) const { return true; }
  void synchronizeEvent(void*) const {}
  void synchronizeDevice(const c10::DeviceIndex) const {}
};

static FakeGuard guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);

struct FakeHooks : at::CUDAHooksInterface {
  FakeHooks(at::CUDAHooksArgs) {}
  void init() const {}
  bool hasCUDA() const { return true; }
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasCuDNN() const { return true; }
  bool compiledWithCuDNN() const { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const { return true; }
  long versionCuDNN() const { return 92000; }
  long versionRuntimeCuDNN() const { return 92000; }
  double batchnormMinEpsilonCuDNN() const { return 1e-5; }
  bool hasPrimaryContext(c10::DeviceIndex) const { return true; }
  int getNumGPUs() const { return 1; }
  c10::DeviceIndex deviceCount() const { return 1; }
  c10::DeviceIndex current_device() const { return 0; }
  c10::DeviceIndex getCurrentDevice() const { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const { return at::detail::getDefaultCPUGenerator(); }
};

namespace at {
using CUDAHooks = ::FakeHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at
