//! The devices that may be used, with equal ones taken together.

use std::collections::BTreeMap;

use hgct_core::cluster::{ClusterSpec, Isolation};
use hgct_core::ids::{Kind, NodeId};
use hgct_core::job::{PlanShape, Policy};
use hgct_core::model::ModelSpec;
use hgct_core::plan::PlanRank;
use hgct_core::profile::Profile;

use crate::bound::ComputeBound;
use crate::cost::{Costs, LinkCost, MemoryLimit, ModelShape};
use crate::{Error, Result};

/// What devices are to do, and the documents that say so.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Task<'a> {
    /// What the user wants of the plan.
    pub(crate) policy: &'a Policy,
    /// Samples a step.
    pub(crate) global_batch: u32,
    /// Tokens a sample.
    pub(crate) seq_len: u32,
    pub(crate) model: &'a ModelSpec,
    pub(crate) cluster: &'a ClusterSpec,
    pub(crate) profile: &'a Profile,
}

/// Everything that the search reads, checked.
#[derive(Debug, Clone)]
pub(crate) struct Fleet<'a> {
    pub(crate) task: Task<'a>,
    pub(crate) shape: ModelShape,
    pub(crate) global_batch: u32,
    /// Most micro-batches of a pipeline.
    pub(crate) max_micro_batches: u32,
    /// In the cluster's order.
    pub(crate) devices: Vec<FleetDevice>,
    pub(crate) costs: Costs,
    pub(crate) classes: Vec<Class>,
    /// The kinds there are; classes and devices name them by index.
    pub(crate) kinds: Vec<Kind>,
    /// Host memory of each node.
    pub(crate) nodes: BTreeMap<NodeId, u64>,
    pub(crate) isolation: Isolation,
    pub(crate) bound: ComputeBound,
    /// Fewest nanoseconds a sample of embedding, block and head, by device.
    least_ns: Vec<[f64; 3]>,
    /// The cheapest way to a sample of embedding, block and head at the bound's prices.
    pub(crate) least_priced: [f64; 3],
}

/// One device that may be used.
#[derive(Debug, Clone)]
pub(crate) struct FleetDevice {
    pub(crate) rank: PlanRank,
    pub(crate) limit: MemoryLimit,
    pub(crate) kind: usize,
    /// Micro-batch sizes that it may use, ascending.
    pub(crate) sizes: Vec<u32>,
    /// Model flops a nanosecond when it trains alone, forward and backward.
    pub(crate) speed: f64,
}

/// Devices that are alike in everything that the search sees.
#[derive(Debug, Clone)]
pub(crate) struct Class {
    /// Indices into `Fleet::devices`, ascending.
    pub(crate) devices: Vec<usize>,
    /// Price of each one's time in the compute bound.
    pub(crate) price: f64,
}

impl<'a> Fleet<'a> {
    pub(crate) fn new(task: Task<'a>) -> Result<Self> {
        let Task { policy, global_batch, seq_len, model, cluster, profile } = task;
        model.validate("config.json")?;
        check_profile(seq_len, model, profile)?;
        let devices = chosen_devices(policy, cluster, profile)?;
        let costs = Costs::new(profile, devices.iter().map(|d| &d.rank.device))?;
        let shape = ModelShape::new(model, seq_len);
        let mut fleet = Self {
            task,
            global_batch,
            max_micro_batches: match policy.max_micro_batches {
                0 => u32::MAX,
                most => most,
            },
            devices,
            classes: Vec::new(),
            kinds: Vec::new(),
            nodes: cluster.nodes.iter().map(|node| (node.name.clone(), node.memory_bytes)).collect(),
            isolation: profile.isolation,
            bound: ComputeBound { prices: Vec::new(), ns_per_sample: 0.0 },
            least_ns: Vec::new(),
            least_priced: [0.0; 3],
            shape,
            costs,
        };
        fleet.measure();
        fleet.classify();
        fleet.check_batch()?;
        Ok(fleet)
    }

    /// Speeds, the compute bound, and kinds.
    fn measure(&mut self) {
        let counts = self.shape.counts(&(0..self.shape.num_layers));
        let flops = self.shape.stage_flops(&(0..self.shape.num_layers));
        let mut least = Vec::with_capacity(self.devices.len());
        for (device, cost) in self.devices.iter_mut().zip(&self.costs.devices) {
            if !self.kinds.contains(&device.rank.kind) {
                self.kinds.push(device.rank.kind.clone());
            }
            device.kind = self.kinds.iter().position(|k| *k == device.rank.kind).unwrap_or(0);
            let mut fewest = [f64::INFINITY; 3];
            let mut sample_ns = f64::INFINITY;
            for size in device.sizes.iter().filter_map(|b| cost.size(*b)) {
                let samples = f64::from(size.micro_batch);
                for (k, least) in fewest.iter_mut().enumerate() {
                    *least = least.min((size.forward_ns[k] + size.backward_ns[k]) as f64 / samples);
                }
                let step = size.forward(counts) + size.backward(counts) + 2 * cost.action_overhead_ns;
                sample_ns = sample_ns.min(step as f64 / samples);
            }
            device.speed = flops / sample_ns.max(1.0);
            least.push(fewest);
        }
        self.bound = ComputeBound::new(&least, counts);
        self.least_ns = least;
    }

    fn classify(&mut self) {
        for d in 0..self.devices.len() {
            let fits = |class: &Class| class.devices.iter().all(|other| self.alike(d, *other));
            match (0..self.classes.len()).find(|c| fits(&self.classes[*c])) {
                Some(class) => self.classes[class].devices.push(d),
                None => self.classes.push(Class { devices: vec![d], price: 0.0 }),
            }
        }
        for class in &mut self.classes {
            // Of devices that are alike any weighted mean of prices is valid; they all get the mean.
            let sum: f64 = class.devices.iter().map(|d| self.bound.prices[*d]).sum();
            class.price = sum / class.devices.len() as f64;
            for d in &class.devices {
                self.bound.prices[*d] = class.price;
            }
        }
        let counts = self.shape.counts(&(0..self.shape.num_layers));
        for k in 0..3 {
            let priced = self.bound.prices.iter().zip(&self.least_ns).map(|(p, c)| p * c[k]);
            self.least_priced[k] = priced.fold(f64::INFINITY, f64::min);
        }
        self.bound.ns_per_sample = (0..3).map(|k| self.least_priced[k] * counts[k] as f64).sum();
    }

    /// The compute bound of some of the devices.
    pub(crate) fn bound_of(&self, counts: &[u8]) -> ComputeBound {
        let devices = self.classes.iter().zip(counts).flat_map(|(c, n)| &c.devices[..usize::from(*n)]);
        let least: Vec<[f64; 3]> = devices.map(|d| self.least_ns[*d]).collect();
        ComputeBound::new(&least, self.shape.counts(&(0..self.shape.num_layers)))
    }

    fn alike(&self, a: usize, b: usize) -> bool {
        let (x, y) = (&self.devices[a], &self.devices[b]);
        let links = &self.costs.links;
        x.rank.kind == y.rank.kind
            && x.rank.node == y.rank.node
            && x.limit == y.limit
            && x.sizes == y.sizes
            && self.costs.devices[a] == self.costs.devices[b]
            && links[a][b] == links[b][a]
            && (0..self.devices.len())
                .filter(|other| *other != a && *other != b)
                .all(|o| links[a][o] == links[b][o] && links[o][a] == links[o][b])
    }

    /// The link between two different devices of these classes.
    pub(crate) fn link(&self, from: usize, to: usize) -> LinkCost {
        let (a, b) = (&self.classes[from].devices, &self.classes[to].devices);
        if from == to {
            a.get(1).map_or(LinkCost::FREE, |other| self.costs.links[a[0]][*other])
        } else {
            self.costs.links[a[0]][b[0]]
        }
    }

    /// The device that stands for a class.
    pub(crate) fn of_class(&self, class: usize) -> (&FleetDevice, &crate::cost::DeviceCost) {
        let d = self.classes[class].devices[0];
        (&self.devices[d], &self.costs.devices[d])
    }

    /// Devices of each class.
    pub(crate) fn counts(&self) -> Vec<u8> {
        self.classes.iter().map(|class| class.devices.len() as u8).collect()
    }

    /// The global batch must be a sum of micro-batches.
    fn check_batch(&self) -> Result<()> {
        let batch = self.global_batch as usize;
        let top = batch + 1024;
        let reachable = if self.task.policy.shape == PlanShape::Pipeline {
            let common = |b: &u32| self.devices.iter().all(|d| d.sizes.contains(b));
            let sizes: Vec<u32> = self.devices[0].sizes.iter().copied().filter(common).collect();
            reachable(&[sizes], self.max_micro_batches, top)
        } else {
            let sizes: Vec<Vec<u32>> = self.devices.iter().map(|d| d.sizes.clone()).collect();
            reachable(&sizes, self.max_micro_batches, top)
        };
        if reachable[batch] {
            return Ok(());
        }
        let below = (1..batch).rev().find(|r| reachable[*r]);
        let above = (batch + 1..=top).find(|r| reachable[*r]);
        let nearest: Vec<String> = below.into_iter().chain(above).map(|n| n.to_string()).collect();
        let mut sizes: Vec<u32> = self.devices.iter().flat_map(|d| d.sizes.iter().copied()).collect();
        sizes.sort_unstable();
        sizes.dedup();
        Err(Error::Batch {
            global_batch: self.global_batch,
            sizes,
            limit: match self.max_micro_batches {
                u32::MAX => String::new(),
                most => format!(" with at most {most} micro-batches a pipeline"),
            },
            nearest: if nearest.is_empty() { "none".into() } else { nearest.join(", ") },
        })
    }
}

/// Which sums of samples some of the pipelines give, where each has one of its sizes.
fn reachable(pipelines: &[Vec<u32>], max_micro_batches: u32, top: usize) -> Vec<bool> {
    let mut reach = vec![false; top + 1];
    reach[0] = true;
    for sizes in pipelines {
        let before = reach.clone();
        for size in sizes {
            let size = *size as usize;
            // Fewest micro-batches of this size on top of what was reachable before.
            let mut fewest: Vec<Option<u32>> = before.iter().map(|r| r.then_some(0)).collect();
            for r in size..=top {
                if fewest[r].is_none() {
                    fewest[r] = fewest[r - size].map(|n| n + 1).filter(|n| *n <= max_micro_batches);
                    reach[r] |= fewest[r].is_some();
                }
            }
        }
    }
    reach
}

fn check_profile(seq_len: u32, model: &ModelSpec, profile: &Profile) -> Result<()> {
    let other = |what, found: String, expected: String| Err(Error::OtherProfile { what, found, expected });
    if profile.seq_len != seq_len {
        return other("seq_len", profile.seq_len.to_string(), seq_len.to_string());
    }
    let expected = hgct_core::canonical::Hash::of(model);
    if profile.model != expected {
        return other("model", profile.model.short().into(), expected.short().into());
    }
    Ok(())
}

fn chosen_devices(policy: &Policy, cluster: &ClusterSpec, profile: &Profile) -> Result<Vec<FleetDevice>> {
    for wanted in &policy.devices {
        if cluster.device(wanted).is_none() {
            let known: Vec<String> = cluster.devices().map(|(_, d)| d.id.to_string()).collect();
            return Err(Error::UnknownDevice { device: wanted.clone(), known: known.join(", ") });
        }
    }
    let mut devices = Vec::new();
    for (node, device) in cluster.devices() {
        if !policy.devices.is_empty() && !policy.devices.contains(&device.id) {
            continue;
        }
        let Some(row) = profile.device(&device.id) else {
            return Err(Error::NotMeasured { device: device.id.clone(), detail: String::new() });
        };
        if row.grant != device.grant {
            return Err(Error::NotMeasured {
                device: device.id.clone(),
                detail: " for its grant in the cluster".into(),
            });
        }
        let measured: Vec<u32> =
            crate::cost::DeviceCost::new(row).sizes.iter().map(|s| s.micro_batch).collect();
        if measured.is_empty() {
            let detail = " with embedding, block and head at one micro-batch size".into();
            return Err(Error::NotMeasured { device: device.id.clone(), detail });
        }
        // A size that a device could not hold, or was too slow to measure, is left to the others.
        let allowed = |b: &u32| policy.micro_batches.is_empty() || policy.micro_batches.contains(b);
        if !measured.iter().any(allowed) {
            let wanted = policy.micro_batches.clone();
            return Err(Error::MicroBatch { device: device.id.clone(), wanted, measured });
        }
        devices.push(FleetDevice {
            rank: PlanRank {
                device: device.id.clone(),
                kind: device.kind.clone(),
                node: node.name.clone(),
                grant: device.grant.clone(),
            },
            limit: MemoryLimit::of(device),
            kind: 0,
            sizes: measured.into_iter().filter(allowed).collect(),
            speed: 0.0,
        });
    }
    if devices.is_empty() {
        return Err(Error::NoDevices {
            reason: if policy.devices.is_empty() {
                "the cluster has none; see `hgct devices`".into()
            } else {
                "`policy.devices` leaves none".into()
            },
        });
    }
    if devices.len() > MAX_DEVICES {
        return Err(Error::NoDevices {
            reason: format!(
                "{} devices are more than can be planned for from a profile ({MAX_DEVICES}); name some in \
                 `policy.devices`",
                devices.len()
            ),
        });
    }
    Ok(devices)
}

/// Counts of devices are bytes in the search.
const MAX_DEVICES: usize = 255;
/// More would take too long for a search that looks at every way to cut.
const MAX_SEARCHED: usize = 12;

impl Fleet<'_> {
    /// Whether there are few enough devices to look at every way to use them.
    pub(crate) fn is_small(&self) -> bool {
        self.devices.len() <= MAX_SEARCHED
    }

    /// By kind: the share of the step that its own speed would give it.
    pub(crate) fn fair_shares(&self) -> Vec<f64> {
        let all: f64 = self.devices.iter().map(|d| d.speed).sum();
        let mut shares = vec![0.0; self.kinds.len()];
        for device in &self.devices {
            shares[device.kind] += device.speed / all.max(f64::MIN_POSITIVE);
        }
        shares
    }
}
