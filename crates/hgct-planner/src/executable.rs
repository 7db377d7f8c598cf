//! Layouts of measured devices as plans that `hgct train` executes.
//!
//! A layout says which pool computes which layers; a plan names devices, who updates what and in which
//! order everything happens. Both searches meet here: a layout becomes a sketch, as the search over a
//! few devices makes them, and is priced by the same simulation, with the same update owners and the
//! same memory of a worker.

use hgct_core::cluster::ClusterSpec;
use hgct_core::ids::DeviceId;
use hgct_core::job::Policy;
use hgct_core::model::ModelSpec;
use hgct_core::profile::Profile;

use crate::choices::choice;
use crate::estimate::{devices_of_pools, measured};
use crate::evaluate::{Evaluated, Sketch};
use crate::explain::{Rejected, none_without};
use crate::fleet::{Fleet, Task};
use crate::instance::{Group, Instance, Layout, Rules, Schedule, Stage, Template, assign};
use crate::planned::{Planned, finish};
use crate::search::{Budget, Outcome};
use crate::wide::{Effort, Found, find};
use crate::{Error, Result};

/// The documents that a layout of measured devices was made from.
#[derive(Debug, Clone, Copy)]
pub struct MeasuredInput<'a> {
    /// The model.
    pub model: &'a ModelSpec,
    /// The devices with their grants.
    pub cluster: &'a ClusterSpec,
    /// What was measured on them.
    pub profile: &'a Profile,
}

/// A layout as a plan, with the prediction of the simulation. `instance` is the problem that
/// [`measured`] made of the same documents. Names no job; whoever trains it does.
pub fn executable(input: &MeasuredInput<'_>, instance: &Instance, layout: &Layout) -> Result<Planned> {
    let MeasuredInput { model, cluster, profile } = *input;
    let policy = Policy::default();
    let task = Task {
        policy: &policy,
        global_batch: instance.global_batch,
        seq_len: instance.seq_len,
        model,
        cluster,
        profile,
    };
    let fleet = Fleet::new(task)?;
    let pools = Pools { fleet: &fleet, instance, devices: devices_of_pools(cluster, profile)? };
    let outcome = pools.fastest(&[layout], 0)?;
    let Some(best) = outcome.best.clone() else { return Err(pools.why_not(layout)) };
    finish(&fleet, &best, &outcome, &none_without(&fleet), Vec::new(), None)
}

/// What is best on more devices than can be searched to the end, and each kind alone.
pub(crate) fn plan_many(fleet: &Fleet<'_>, budget: &Budget<'_>) -> Result<(Outcome, Vec<Rejected>)> {
    let layouts = Layouts::new(fleet, budget)?;
    let pools = layouts.pools(fleet)?;
    let min_kinds = fleet.task.policy.min_kinds.wanted(fleet.kinds.len() as u32);
    let mut rejected = Vec::new();
    for (pool, layout) in layouts.alone() {
        let name = format!("{} alone", layouts.instance.pools[pool].kind);
        rejected.push(Rejected::new(fleet, name, &pools.fastest(&[layout], 0)?));
    }
    Ok((pools.fastest(&layouts.all(), min_kinds)?, rejected))
}

/// The layouts of the search over pools, as this fleet executes them: where a search over devices may
/// begin. None where that search has no answer, for whatever reason: it is not what was asked for.
pub(crate) fn starts(fleet: &Fleet<'_>, budget: &Budget<'_>) -> Vec<Evaluated> {
    let Ok(layouts) = Layouts::new(fleet, budget) else { return Vec::new() };
    let Ok(pools) = layouts.pools(fleet) else { return Vec::new() };
    let executed = |layout: &&Layout| pools.sketch(layout).ok()?.evaluate(fleet).ok()?;
    layouts.all().iter().filter_map(executed).collect()
}

/// What the search over pools found for a fleet.
struct Layouts {
    cluster: ClusterSpec,
    instance: Instance,
    found: Found,
}

impl Layouts {
    fn new(fleet: &Fleet<'_>, budget: &Budget<'_>) -> Result<Self> {
        let Task { policy, model, profile, .. } = fleet.task;
        let cluster = only_chosen(fleet);
        let mut instance = measured(&cluster, profile, model, fleet.global_batch, Rules::executable())?;
        if !policy.micro_batches.is_empty() {
            for pool in &mut instance.pools {
                pool.costs.retain(|cost| policy.micro_batches.contains(&cost.micro_batch));
            }
        }
        let effort = Effort { nodes: budget.nodes, stop: budget.stop };
        let found = find(&instance, None, &effort).map_err(|faults| Error::Layout {
            fault: faults.first().map_or_else(String::new, ToString::to_string),
        })?;
        Ok(Self { cluster, instance, found })
    }

    fn pools<'a>(&'a self, fleet: &'a Fleet<'a>) -> Result<Pools<'a>> {
        let devices = devices_of_pools(&self.cluster, fleet.task.profile)?;
        Ok(Pools { fleet, instance: &self.instance, devices })
    }

    /// The best of each pool alone.
    fn alone(&self) -> impl Iterator<Item = (usize, &Layout)> {
        let rows = self.found.alternatives.iter();
        rows.filter_map(|of| Some((*of.pools.first()?, &of.best.as_ref()?.0)))
    }

    /// The best of all, then of each pool alone.
    fn all(&self) -> Vec<&Layout> {
        let best = self.found.best.as_ref().map(|(layout, _)| layout);
        best.into_iter().chain(self.alone().map(|(_, layout)| layout)).collect()
    }
}

/// The cluster with only the devices that the policy leaves.
fn only_chosen(fleet: &Fleet<'_>) -> ClusterSpec {
    let mut cluster = fleet.task.cluster.clone();
    for node in &mut cluster.nodes {
        node.devices.retain(|device| fleet.devices.iter().any(|of| of.rank.device == device.id));
    }
    cluster
}

/// The pools of an instance with their devices.
struct Pools<'a> {
    fleet: &'a Fleet<'a>,
    instance: &'a Instance,
    /// By pool, by node.
    devices: Vec<Vec<Vec<DeviceId>>>,
}

impl Pools<'_> {
    /// Simulates layouts and keeps the fastest that fits and has so many kinds that count.
    fn fastest(&self, layouts: &[&Layout], min_kinds: u32) -> Result<Outcome> {
        let mut best: Option<Evaluated> = None;
        for layout in layouts {
            let sketch = self.sketch(layout)?;
            if !sketch.is_allowed(self.fleet, min_kinds) {
                continue;
            }
            if let Some(found) = sketch.evaluate(self.fleet)?
                && best.as_ref().is_none_or(|best| found.step_ns < best.step_ns)
            {
                best = Some(found);
            }
        }
        let proven_ns = self.fleet.bound.step_ns(self.fleet.global_batch);
        Ok(Outcome { best, proven_ns, finished: false, simulated: layouts.len() as u64 })
    }

    /// What a layout lacks that no way to choose owners makes fit.
    fn why_not(&self, layout: &Layout) -> Error {
        let memory = self.sketch(layout).and_then(|sketch| {
            let ranked = sketch.ranked(self.fleet);
            sketch.memory(self.fleet, &ranked, 0, &vec![0; ranked.devices.len()])
        });
        let fault = "its workers do not fit into memory with what they update";
        memory.err().unwrap_or_else(|| Error::Layout { fault: fault.into() })
    }

    fn sketch(&self, layout: &Layout) -> Result<Sketch> {
        let groups = assign(self.instance, layout)
            .ok_or_else(|| Error::Layout { fault: "its groups do not fit into the nodes".into() })?;
        let alike = |a: &Group, b: &Group| (a.template, a.pipeline) == (b.template, b.pipeline);
        let mut pipelines = Vec::new();
        for groups in groups.chunk_by(alike) {
            let template = &layout.templates[groups[0].template];
            runs(template)?;
            let stages = template
                .stages
                .iter()
                .zip(groups)
                .map(|(stage, group)| Ok((self.class(group)?, stage.end_layer, stage.recompute)));
            let stages = stages.collect::<Result<Vec<_>>>()?;
            let choice = choice(self.fleet, template.micro_batch, &stages).ok_or_else(|| Error::Layout {
                fault: format!("micro-batches of {} were not measured everywhere", template.micro_batch),
            })?;
            pipelines.push((choice, template.num_micro_batches));
        }
        Ok(Sketch::new(pipelines))
    }

    /// The class of the device that a group of one is.
    fn class(&self, group: &Group) -> Result<usize> {
        let nodes = self.devices.get(group.pool);
        let id = nodes.and_then(|nodes| nodes.get(group.node as usize)?.get(group.first_device as usize));
        let of = |id: &DeviceId| self.fleet.devices.iter().position(|device| device.rank.device == *id);
        let at = id.and_then(of);
        let class = at.and_then(|at| self.fleet.classes.iter().position(|class| class.devices.contains(&at)));
        class.ok_or_else(|| Error::Layout {
            fault: format!("there is no device for node {} of pool {}", group.node, group.pool),
        })
    }
}

/// Whether workers can run a template today.
fn runs(template: &Template) -> Result<()> {
    let not_yet =
        |what, value: String, instead| Err(Error::Core(hgct_core::Error::NotYet { what, value, instead }));
    let parallel = |stage: &&Stage| stage.num_devices() > 1;
    if let Some(stage) = template.stages.iter().find(parallel) {
        let value = format!("{} × {}", stage.replicas, stage.tensor_parallel);
        return not_yet("devices of a stage (replicas × tensor parallel degree)", value, "1 × 1");
    }
    if template.schedule != Schedule::OneForwardOneBackward {
        return not_yet("schedule", format!("{:?}", template.schedule), "1f1b");
    }
    Ok(())
}
