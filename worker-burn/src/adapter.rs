//! The adapters that wgpu's Vulkan back end (Metal on a Mac) lists, and opening one of them.
//!
//! An adapter is named `vulkan:VENDOR:DEVICE:N`: its hex vendor and device ids, and which of the
//! like ones it is. Unlike a place in a list, that stays true when drivers come and go.

use std::collections::BTreeMap;

use burn_tensor::Device;
use burn_tensor::wgpu::{WgpuSetup, wgpu};

/// What this worker's device strings begin with.
#[cfg(target_os = "macos")]
pub const API: &str = "metal";
/// What this worker's device strings begin with.
#[cfg(not(target_os = "macos"))]
pub const API: &str = "vulkan";

#[cfg(target_os = "macos")]
const BACKEND: wgpu::Backend = wgpu::Backend::Metal;
#[cfg(not(target_os = "macos"))]
const BACKEND: wgpu::Backend = wgpu::Backend::Vulkan;

/// Least limits with which every kernel of a decoder runs: the defaults of WebGPU, which all but
/// the smallest embedded GPUs have.
const NEEDED: [Needed; 5] = [
    ("largest storage binding, bytes", 128 << 20, |limits| limits.max_storage_buffer_binding_size),
    ("storage bindings of a kernel", 8, |limits| u64::from(limits.max_storage_buffers_per_shader_stage)),
    ("shared memory of a workgroup, bytes", 16 << 10, |limits| {
        u64::from(limits.max_compute_workgroup_storage_size)
    }),
    ("invocations of a workgroup", 256, |limits| u64::from(limits.max_compute_invocations_per_workgroup)),
    ("workgroups in a dimension", 65_535, |limits| u64::from(limits.max_compute_workgroups_per_dimension)),
];

/// A limit: what it is, the least, and where it stands.
type Needed = (&'static str, u64, fn(&wgpu::Limits) -> u64);

/// An adapter that wgpu lists.
pub struct Adapter {
    /// Its device string.
    pub device_string: String,
    /// What its driver calls it, without what stands in brackets.
    pub name: String,
    /// Its place on the PCI bus, `dddd:bb:dd.f`, where it has one.
    pub pci: Option<String>,
    /// The driver's name and version.
    pub driver: String,
    /// Memory of its own, bytes; `None` where it uses the host's, or nobody tells.
    pub memory_bytes: Option<u64>,
    /// Whether it is a program on the processor.
    pub software: bool,
    adapter: wgpu::Adapter,
    instance: wgpu::Instance,
}

/// An open adapter.
pub struct Opened {
    /// The device to make tensors on.
    pub device: Device,
    /// The same device for what Burn has no words for.
    pub raw: wgpu::Device,
    /// Largest tensor, bytes.
    pub largest_tensor_bytes: u64,
}

/// Lists all adapters.
pub fn list() -> Vec<Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: BACKEND.into(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let found = burn_tensor::read_sync(instance.enumerate_adapters(BACKEND.into()));
    let mut counts: BTreeMap<(u32, u32), u32> = BTreeMap::new();
    found
        .into_iter()
        .map(|adapter| {
            let info = adapter.get_info();
            let count = counts.entry((info.vendor, info.device)).or_default();
            let device_string = format!("{API}:{:04x}:{:04x}:{count}", info.vendor, info.device);
            *count += 1;
            let software = info.device_type == wgpu::DeviceType::Cpu;
            Adapter {
                device_string,
                name: info.name.split(" (").next().unwrap_or_default().trim().to_owned(),
                pci: Some(info.device_pci_bus_id).filter(|pci| !pci.is_empty()),
                driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
                memory_bytes: if software { None } else { memory_bytes(&adapter) },
                software,
                adapter,
                instance: instance.clone(),
            }
        })
        .collect()
}

/// The adapter of that device string, or a message that says which ones there are.
pub fn find(device_string: &str) -> Result<Adapter, String> {
    let mut adapters = list();
    if let Some(at) = adapters.iter().position(|adapter| adapter.device_string == device_string) {
        return Ok(adapters.swap_remove(at));
    }
    let known: Vec<_> = adapters.iter().map(|adapter| adapter.device_string.as_str()).collect();
    let known = if known.is_empty() { "there is none".into() } else { known.join(", ") };
    Err(format!("no {API} adapter is `{device_string}`; present: {known}"))
}

impl Adapter {
    /// Why this adapter cannot be used, if its limits say so.
    pub fn lacks(&self) -> Option<String> {
        lacks(&self.adapter.limits())
    }

    /// Opens the adapter for Burn.
    pub fn open(self) -> Result<Opened, String> {
        if let Some(reason) = self.lacks() {
            return Err(reason);
        }
        let limits = self.adapter.limits();
        let largest_tensor_bytes = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        let description = wgpu::DeviceDescriptor {
            label: Some("hgct"),
            // Burn asks the adapter, not the device, what its kernels may use: all must be on. Only
            // this one makes others slower.
            required_features: self.adapter.features().difference(wgpu::Features::MAPPABLE_PRIMARY_BUFFERS),
            required_limits: limits,
            // Burn pools memory itself.
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            // SAFETY: among the features of an adapter are experimental ones, whose kernels only Burn
            // makes, as it does on a device of its own.
            experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
            ..wgpu::DeviceDescriptor::default()
        };
        let (device, queue) = burn_tensor::read_sync(self.adapter.request_device(&description))
            .map_err(|error| format!("{} cannot be opened: {error}", self.device_string))?;
        let raw = device.clone();
        let setup =
            WgpuSetup { instance: self.instance, adapter: self.adapter, device, queue, backend: BACKEND };
        let device = Device::wgpu_options()
            .setup(setup)
            .init()
            .map_err(|error| format!("{} does not serve Burn: {error}", self.device_string))?;
        Ok(Opened { device, raw, largest_tensor_bytes })
    }
}

fn lacks(limits: &wgpu::Limits) -> Option<String> {
    let short = NEEDED.iter().find(|(_, least, of)| of(limits) < *least);
    short.map(|(what, least, of)| format!("its limit is too low: {what}: {}, needed {least}", of(limits)))
}

/// The largest memory heap on the card.
#[cfg(not(target_os = "macos"))]
fn memory_bytes(adapter: &wgpu::Adapter) -> Option<u64> {
    // SAFETY: nothing is destroyed through the handle, which lives shorter than the adapter.
    let hal = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let instance = hal.shared_instance().raw_instance();
    // SAFETY: the physical device belongs to this instance.
    let memory = unsafe { instance.get_physical_device_memory_properties(hal.raw_physical_device()) };
    // `DEVICE_LOCAL` is the lowest flag of a heap (Vulkan 1.3, VkMemoryHeapFlagBits).
    let heaps = memory.memory_heaps.iter().take(memory.memory_heap_count as usize);
    heaps.filter(|heap| heap.flags.as_raw() & 1 != 0).map(|heap| heap.size).max()
}

#[cfg(target_os = "macos")]
fn memory_bytes(_: &wgpu::Adapter) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_without_the_needed_limits_says_which() {
        assert_eq!(lacks(&wgpu::Limits::default()), None);
        let small = wgpu::Limits::downlevel_defaults();
        let reason = lacks(&small).expect("an embedded GPU's limits were accepted");
        assert!(reason.contains("storage bindings of a kernel: 4, needed 8"), "{reason}");
    }

    #[test]
    fn an_unknown_adapter_is_named_with_those_that_are_there() {
        let Err(error) = find("vulkan:ffff:ffff:7") else { panic!("found") };
        assert!(error.contains("`vulkan:ffff:ffff:7`; present: "), "{error}");
    }
}
