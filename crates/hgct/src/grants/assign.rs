//! Policy for grants.

use std::collections::BTreeMap;

use hgct_core::cluster::{Grant, Isolation, NodeSpec};

use crate::vendors::Vendor;

/// Quotas count in periods of 20 ms, and the kernel's least quota is 1 ms.
const LEAST_MILLICORES: u32 = 50;
const MIB: u64 = 1 << 20;

/// How the stacks on one host share it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Policy {
    /// Weight of an engine on the processor; 1 for one that is not named.
    pub(crate) weights: BTreeMap<String, f64>,
    /// Thousandths of each core that nobody is granted: for the coordinator, the agent and the
    /// kernel's share of communication. Without it a worker pays for them with jitter, and all
    /// others wait for it.
    pub(crate) headroom_millicores: u32,
}

impl Policy {
    /// The shares that the vendor files of the processor and of software adapters name.
    pub(crate) fn new(vendors: &[Vendor]) -> Self {
        let on_processor = |vendor: &&Vendor| vendor.recognise.processor || vendor.recognise.adapters;
        let processor = vendors.iter().filter(on_processor);
        let engines = processor.flat_map(|vendor| &vendor.engines);
        let weights = engines.filter_map(|engine| Some((engine.engine.clone(), engine.share?))).collect();
        Self { weights, headroom_millicores: 40 }
    }

    fn weight(&self, engine: &str) -> f64 {
        self.weights.get(engine).copied().filter(|weight| *weight > 0.0).unwrap_or(1.0)
    }
}

/// Grants every device of `node` its part of the host.
///
/// All cores are given away but for the headroom, since a core that nobody may use trains nothing:
/// - *As many cores as devices, or more*: whole cores, each to one device. A card's worker gets
///   one, and the stacks on the processor share the rest by weight, one at least.
/// - *Fewer*: one thread each, pinned. The heaviest goes first to the core with the least weight
///   on it, then each core's time is divided among its stacks by weight. A stack that may wander
///   would be throttled on one core while another idles.
/// - *Unisolated*: nothing would hold these shares, so all may use every core and expect the equal
///   part that the kernel's scheduler gives them.
///
/// Weights lean towards the stacks that do more with a core (total throughput is the sum of
/// share × speed), but leave each enough to carry micro-batches at a useful rate. Memory is
/// divided equally.
pub(crate) fn assign(node: &mut NodeSpec, policy: &Policy) {
    let num_devices = node.devices.len() as u32;
    if num_devices == 0 {
        return;
    }
    let cores = node.cores.max(1);
    let memory_bytes = node.memory_bytes / u64::from(num_devices) / MIB * MIB;
    let usable = 1000 - policy.headroom_millicores.min(900);
    let grants = if node.isolation == Isolation::Unisolated {
        equal(num_devices, cores)
    } else if cores >= num_devices {
        whole_cores(node, policy, cores, usable)
    } else {
        shared_cores(node, policy, cores, usable)
    };
    for (device, grant) in node.devices.iter_mut().zip(grants) {
        device.grant = Grant { memory_bytes, ..grant };
    }
}

fn equal(num_devices: u32, cores: u32) -> Vec<Grant> {
    let threads = (cores / num_devices).max(1);
    let cpu_millicores = (cores * 1000 / num_devices).min(threads * 1000);
    vec![Grant { cpu_millicores, cores: Vec::new(), threads, memory_bytes: 0 }; num_devices as usize]
}

fn whole_cores(node: &NodeSpec, policy: &Policy, cores: u32, usable: u32) -> Vec<Grant> {
    let on_processor = |resource: &str| resource == "cpu";
    let stacks = node.devices.iter().filter(|device| on_processor(&device.host_resource));
    let weights: Vec<f64> = stacks.map(|device| policy.weight(&device.engine)).collect();
    let num_cards = node.devices.len() as u32 - weights.len() as u32;
    // Only cards: they share all cores equally.
    let per_card = if weights.is_empty() { cores / num_cards.max(1) } else { 1 };
    let mut counts = apportion(cores - num_cards * per_card, &weights).into_iter();
    let mut next = 0;
    let mut grant = |count: u32| {
        let mine = (next..next + count).collect();
        next += count;
        Grant { cpu_millicores: count * usable, cores: mine, threads: count, memory_bytes: 0 }
    };
    let count = node.devices.iter().map(|device| {
        if on_processor(&device.host_resource) { counts.next().unwrap_or(1) } else { per_card }
    });
    count.map(&mut grant).collect()
}

fn shared_cores(node: &NodeSpec, policy: &Policy, cores: u32, usable: u32) -> Vec<Grant> {
    let weights: Vec<f64> = node.devices.iter().map(|device| policy.weight(&device.engine)).collect();
    let mut heaviest: Vec<usize> = (0..weights.len()).collect();
    heaviest.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
    let mut loads = vec![0.0f64; cores as usize];
    let mut places = vec![0; weights.len()];
    for device in heaviest {
        let lightest = (0..loads.len()).min_by(|a, b| loads[*a].total_cmp(&loads[*b])).unwrap_or(0);
        loads[lightest] += weights[device];
        places[device] = lightest;
    }
    let grant = |(weight, place): (&f64, &usize)| {
        let share = f64::from(usable) * weight / loads[*place];
        let cpu_millicores = (share as u32).max(LEAST_MILLICORES);
        Grant { cpu_millicores, cores: vec![*place as u32], threads: 1, memory_bytes: 0 }
    };
    weights.iter().zip(&places).map(grant).collect()
}

/// Divides `total` into whole parts, one at least each, by the largest remainders.
fn apportion(total: u32, weights: &[f64]) -> Vec<u32> {
    let sum: f64 = weights.iter().sum();
    let spare = f64::from(total.saturating_sub(weights.len() as u32));
    let exact: Vec<f64> = weights.iter().map(|weight| 1.0 + spare * weight / sum).collect();
    let mut parts: Vec<u32> = exact.iter().map(|part| *part as u32).collect();
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_by(|a, b| exact[*b].fract().total_cmp(&exact[*a].fract()));
    let left = total.saturating_sub(parts.iter().sum());
    for index in order.into_iter().take(left as usize) {
        parts[index] += 1;
    }
    parts
}

#[cfg(test)]
mod tests {
    use hgct_core::canonical::Hash;
    use hgct_core::cluster::{ClusterSpec, DeviceSpec};
    use hgct_core::ids::{DeviceId, EnvironmentId, Kind, NodeId};
    use proptest::prelude::*;

    use super::*;

    fn node(cores: u32, devices: &[(&str, &str)]) -> NodeSpec {
        let device = |(index, (engine, resource)): (usize, &(&str, &str))| DeviceSpec {
            id: DeviceId::new(format!("n/e{index}:0")).unwrap(),
            kind: Kind::new("k").unwrap(),
            vendor: "v".into(),
            identity: "i".into(),
            engine: (*engine).into(),
            device_string: "cpu".into(),
            environment: EnvironmentId::new(format!("e{index}")).unwrap(),
            environment_hash: Hash::of_bytes(b""),
            framework_version: "1".into(),
            driver: None,
            memory_bytes: 0,
            host_resource: (*resource).into(),
            grant: Grant { cpu_millicores: 1, cores: vec![], threads: 1, memory_bytes: 0 },
        };
        NodeSpec {
            name: NodeId::new("n").unwrap(),
            cores,
            memory_bytes: 16 << 30,
            isolation: Isolation::Cgroup,
            devices: devices.iter().enumerate().map(device).collect(),
        }
    }

    const FOUR: [(&str, &str); 4] = [("torch", "cpu"), ("jax", "cpu"), ("paddle", "cpu"), ("mlx", "cpu")];

    fn policy() -> Policy {
        Policy::new(&crate::vendors::load(None).unwrap())
    }

    fn assigned(mut node: NodeSpec) -> Vec<Grant> {
        assign(&mut node, &policy());
        node.devices.into_iter().map(|device| device.grant).collect()
    }

    #[test]
    fn four_stacks_fill_two_cores() {
        let grants = assigned(node(2, &FOUR));
        let shares: Vec<_> = grants.iter().map(|grant| (grant.cpu_millicores, grant.cores[0])).collect();
        assert_eq!(shares, [(660, 0), (548, 1), (411, 1), (300, 0)]);
        assert!(grants.iter().all(|grant| grant.threads == 1 && grant.memory_bytes == 4 << 30));
    }

    #[test]
    fn with_cores_enough_each_stack_has_its_own() {
        let grants = assigned(node(16, &FOUR));
        let counts: Vec<_> = grants.iter().map(|grant| grant.threads).collect();
        assert_eq!(counts, [6, 4, 3, 3]);
        let all: Vec<u32> = grants.iter().flat_map(|grant| grant.cores.clone()).collect();
        assert_eq!(all, (0..16).collect::<Vec<_>>());
    }

    #[test]
    fn a_card_takes_one_core_and_leaves_the_rest() {
        let grants = assigned(node(8, &[("torch", "0000:3b:00.0"), ("torch", "cpu"), ("jax", "cpu")]));
        assert_eq!(grants.iter().map(|grant| grant.threads).collect::<Vec<_>>(), [1, 4, 3]);
        let grants = assigned(node(8, &[("torch", "a"), ("torch", "b")]));
        assert_eq!(grants.iter().map(|grant| grant.threads).collect::<Vec<_>>(), [4, 4]);
    }

    #[test]
    fn what_nothing_holds_is_not_promised() {
        let mut node = node(2, &FOUR);
        node.isolation = Isolation::Unisolated;
        let grants = assigned(node);
        assert!(grants.iter().all(|grant| grant.cores.is_empty() && grant.cpu_millicores == 500));
    }

    proptest! {
        #[test]
        fn grants_fit_every_host(
            cores in 1u32..70,
            engines in prop::collection::vec((0usize..5, any::<bool>()), 1..12),
            isolated in any::<bool>(),
        ) {
            let names = ["torch", "jax", "paddle", "mlx", "other"];
            let devices: Vec<_> =
                engines.iter().map(|(e, card)| (names[*e], if *card { "card" } else { "cpu" })).collect();
            let mut node = node(cores, &devices);
            node.isolation = if isolated { Isolation::Cgroup } else { Isolation::Unisolated };
            assign(&mut node, &policy());
            let granted: u32 = node.devices.iter().map(|device| device.grant.cpu_millicores).sum();
            // A dozen least quotas on one core may exceed it; nothing else may.
            prop_assert!(granted <= cores * 1000 || cores == 1);
            let spec = ClusterSpec { format: ClusterSpec::FORMAT, nodes: vec![node] };
            prop_assert_eq!(spec.validate("cluster.toml"), Ok(()));
        }
    }
}
