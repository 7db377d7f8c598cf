//! The adapters that wgpu's Vulkan back end (Metal on a Mac) lists, and opening one of them.
//!
//! An adapter is named `vulkan:VENDOR:DEVICE:N`: its hex vendor and device ids, and which of the
//! like ones it is, by their place on the bus. Unlike a place in a list, that stays true when
//! drivers come and go.

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
    /// Its UUID, hex, where its driver tells; NVIDIA's is what their other software calls the card.
    pub uuid: Option<String>,
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

/// Lists all adapters: cards, then those that share the host's memory, then software.
pub fn list() -> Vec<Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: BACKEND.into(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let found = burn_tensor::read_sync(instance.enumerate_adapters(BACKEND.into()));
    let mut found: Vec<_> = found.into_iter().map(|adapter| (adapter.get_info(), adapter)).collect();
    found.sort_by_cached_key(|(info, _)| (place(info.device_type), info.device_pci_bus_id.clone()));
    let mut counts: BTreeMap<(u32, u32), u32> = BTreeMap::new();
    found
        .into_iter()
        .map(|(info, adapter)| {
            let count = counts.entry((info.vendor, info.device)).or_default();
            let device_string = format!("{API}:{:04x}:{:04x}:{count}", info.vendor, info.device);
            *count += 1;
            Adapter {
                device_string,
                name: info.name.split(" (").next().unwrap_or_default().trim().to_owned(),
                pci: Some(info.device_pci_bus_id).filter(|pci| !pci.is_empty()),
                uuid: vulkan::uuid(&adapter),
                driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
                memory_bytes: if has_memory(info.device_type) {
                    vulkan::memory_bytes(&adapter)
                } else {
                    None
                },
                software: info.device_type == wgpu::DeviceType::Cpu,
                adapter,
                instance: instance.clone(),
            }
        })
        .collect()
}

fn place(of: wgpu::DeviceType) -> u8 {
    match of {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::Cpu => 2,
        _ => 1,
    }
}

/// Whether its heaps are its own. Those of an integrated adapter and of software are the host's, which
/// has them in its own count already.
fn has_memory(of: wgpu::DeviceType) -> bool {
    !matches!(of, wgpu::DeviceType::IntegratedGpu | wgpu::DeviceType::Cpu)
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

impl Opened {
    /// How much of the adapter's own memory this process may take in all, bytes, where its driver
    /// tells: others have the rest.
    pub fn budget_bytes(&self) -> Option<u64> {
        vulkan::budget_bytes(&self.raw)
    }
}

fn lacks(limits: &wgpu::Limits) -> Option<String> {
    let short = NEEDED.iter().find(|(_, least, of)| of(limits) < *least);
    short.map(|(what, least, of)| format!("its limit is too low: {what}: {}, needed {least}", of(limits)))
}

/// What wgpu has no words for.
#[cfg(not(target_os = "macos"))]
mod vulkan {
    use std::fmt::Write as _;

    use ash::vk;
    use burn_tensor::wgpu::wgpu;
    use wgpu::hal::api::Vulkan;

    /// The largest memory heap on the card.
    pub(super) fn memory_bytes(adapter: &wgpu::Adapter) -> Option<u64> {
        // SAFETY: nothing is destroyed through the handle, which lives shorter than the adapter.
        let hal = unsafe { adapter.as_hal::<Vulkan>() }?;
        let instance = hal.shared_instance().raw_instance();
        // SAFETY: the physical device belongs to this instance.
        let memory = unsafe { instance.get_physical_device_memory_properties(hal.raw_physical_device()) };
        largest_heap(&memory).map(|(_, bytes)| bytes)
    }

    /// How much of that heap this process may take in all, where the driver tells.
    pub(super) fn budget_bytes(device: &wgpu::Device) -> Option<u64> {
        // SAFETY: as above.
        let hal = unsafe { device.as_hal::<Vulkan>() }?;
        // wgpu enables it where there is one.
        if !hal.enabled_device_extensions().contains(&ash::ext::memory_budget::NAME) {
            return None;
        }
        let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
        let mut memory = vk::PhysicalDeviceMemoryProperties2::default().push_next(&mut budget);
        let (instance, device) = (hal.shared_instance().raw_instance(), hal.raw_physical_device());
        // SAFETY: the physical device belongs to this instance, and the extension needs this call.
        unsafe { instance.get_physical_device_memory_properties2(device, &mut memory) };
        let (heap, _) = largest_heap(&memory.memory_properties)?;
        Some(budget.heap_budget[heap])
    }

    /// Index and bytes of the largest heap on the card.
    fn largest_heap(memory: &vk::PhysicalDeviceMemoryProperties) -> Option<(usize, u64)> {
        let heaps = memory.memory_heaps_as_slice().iter().enumerate();
        let own = heaps.filter(|(_, heap)| heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL));
        own.map(|(at, heap)| (at, heap.size)).max_by_key(|(_, bytes)| *bytes)
    }

    /// The device's UUID.
    pub(super) fn uuid(adapter: &wgpu::Adapter) -> Option<String> {
        // SAFETY: as above.
        let hal = unsafe { adapter.as_hal::<Vulkan>() }?;
        let instance = hal.shared_instance();
        let version = hal.physical_device_capabilities().properties().api_version;
        if version.min(instance.instance_api_version()) < vk::API_VERSION_1_1 {
            return None;
        }
        let mut id = vk::PhysicalDeviceIDProperties::default();
        let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut id);
        let device = hal.raw_physical_device();
        // SAFETY: the physical device belongs to this instance, and both know this call of Vulkan 1.1.
        unsafe { instance.raw_instance().get_physical_device_properties2(device, &mut properties) };
        (id.device_uuid != [0; vk::UUID_SIZE]).then(|| text(id.device_uuid))
    }

    /// As all write it: 8, 4, 4, 4 and 12 hex digits.
    pub(super) fn text(uuid: [u8; vk::UUID_SIZE]) -> String {
        let mut text = String::new();
        for (at, byte) in uuid.iter().enumerate() {
            let dash = if [4, 6, 8, 10].contains(&at) { "-" } else { "" };
            let _ = write!(text, "{dash}{byte:02x}");
        }
        text
    }
}

#[cfg(target_os = "macos")]
mod vulkan {
    use burn_tensor::wgpu::wgpu;

    pub(super) fn memory_bytes(_: &wgpu::Adapter) -> Option<u64> {
        None
    }

    pub(super) fn budget_bytes(_: &wgpu::Device) -> Option<u64> {
        None
    }

    pub(super) fn uuid(_: &wgpu::Adapter) -> Option<String> {
        None
    }
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
    fn memory_of_the_host_is_nobodys_own() {
        use wgpu::DeviceType::{Cpu, DiscreteGpu, IntegratedGpu, Other, VirtualGpu};
        let of = |types: &[wgpu::DeviceType]| types.iter().map(|one| has_memory(*one)).collect::<Vec<_>>();
        assert_eq!(of(&[DiscreteGpu, VirtualGpu, Other]), [true; 3]);
        assert_eq!(of(&[IntegratedGpu, Cpu]), [false; 2]);
        assert!(place(DiscreteGpu) < place(IntegratedGpu) && place(IntegratedGpu) < place(Cpu));
    }

    #[cfg(not(target_os = "macos"))]
    #[test]
    fn a_uuid_is_written_as_other_software_writes_it() {
        let bytes = std::array::from_fn(|at| at as u8 * 17);
        assert_eq!(vulkan::text(bytes), "00112233-4455-6677-8899-aabbccddeeff");
    }

    #[test]
    fn an_unknown_adapter_is_named_with_those_that_are_there() {
        let Err(error) = find("vulkan:ffff:ffff:7") else { panic!("found") };
        assert!(error.contains("`vulkan:ffff:ffff:7`; present: "), "{error}");
    }
}
