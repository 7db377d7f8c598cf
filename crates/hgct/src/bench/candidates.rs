//! What the training benchmark compares: four stacks under quotas, the plans over all of them, and
//! each alone.

use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use hgct_core::cluster::{ClusterSpec, DeviceSpec, Grant};
use hgct_core::ids::{DeviceId, Rank};
use hgct_core::job::{MinKinds, PlanShape};
use hgct_core::plan::{Plan, PlanBuilder, PlanRank};
use hgct_core::profile::Profile;
use hgct_planner::{Budget, PlanInput, Planned};

use crate::job::LoadedJob;
use crate::session::with_grants;
use crate::vendors::NATIVE;

/// Engine, thousandths of a core, core: the slowest is about 12 % of the sum, the fastest three
/// times as fast.
const QUOTAS: [(&str, u32, u32); 4] =
    [("torch", 550, 0), ("paddle", 300, 0), ("jax", 400, 1), ("mlx", 250, 1)];

/// What `--with vulkan` adds: a part of a core that the four leave free.
const VULKAN: (&str, u32, u32) = (NATIVE, 300, 1);

/// Micro-batches a step at most.
const MAX_MICRO_BATCHES: u32 = 64;
/// Global batches to choose from: a step of these takes about twenty seconds.
const BATCHES: std::ops::RangeInclusive<u32> = 160..=224;

/// What is compared.
pub(super) struct Candidate {
    pub(super) name: String,
    pub(super) plan: Arc<Plan>,
    pub(super) planned: Planned,
    /// What it could use.
    pub(super) among: Vec<DeviceId>,
    /// It has a software adapter in it, for which no rule is made.
    pub(super) outside: bool,
}

/// The four stacks, each with its quota, core and one thread; perhaps a Vulkan adapter beside them.
pub(super) fn quotas(cluster: ClusterSpec, with_vulkan: bool) -> Result<ClusterSpec> {
    let quotas: Vec<_> = QUOTAS.into_iter().chain(with_vulkan.then_some(VULKAN)).collect();
    let mut nodes = cluster.nodes;
    for node in &mut nodes {
        node.devices.retain(|device| {
            (device.host_resource == "cpu" || device.engine == NATIVE)
                && quotas.iter().any(|(engine, ..)| *engine == device.engine)
        });
        // A real adapter before a software one.
        node.devices.sort_by_key(|device| {
            let place = quotas.iter().position(|(engine, ..)| *engine == device.engine);
            (place, is_software_adapter(device))
        });
        node.devices.dedup_by_key(|device| device.engine.clone());
    }
    let mut cluster = with_grants(nodes)?;
    for device in cluster.nodes.iter_mut().flat_map(|node| &mut node.devices) {
        let quota = quotas.iter().find(|(engine, ..)| *engine == device.engine);
        let (_, cpu_millicores, core) = *quota.ok_or_else(|| anyhow!("{} has no quota", device.id))?;
        let memory_bytes = device.grant.memory_bytes;
        device.grant = Grant { cpu_millicores, cores: vec![core], threads: 1, memory_bytes };
    }
    cluster.validate("the benchmark's cluster")?;
    let adapters = cluster.devices().filter(|(_, device)| device.engine == NATIVE).count();
    match cluster.devices().count() - adapters {
        n if n != QUOTAS.len() => bail!(
            "the benchmark needs torch, Paddle, JAX and MLX on the processor; {n} of them can be used: see `hgct devices`"
        ),
        _ if with_vulkan && adapters == 0 => {
            bail!("no Vulkan adapter can be used: run `make vulkan`, then see `hgct devices`")
        }
        _ => Ok(cluster),
    }
}

fn is_software_adapter(device: &DeviceSpec) -> bool {
    device.engine == NATIVE && device.host_resource == "cpu"
}

/// The devices for which the rules are made: all but software adapters.
pub(super) fn that_count(cluster: &ClusterSpec) -> ClusterSpec {
    let mut cluster = cluster.clone();
    for node in &mut cluster.nodes {
        node.devices.retain(|device| !is_software_adapter(device));
    }
    cluster
}

/// The planner's choice over all devices, a software adapter among them; where it would leave that
/// out, its choice with every kind.
pub(super) fn with_software(
    loaded: &LoadedJob,
    cluster: &ClusterSpec,
    profile: &Profile,
) -> Result<Candidate> {
    let mut job = loaded.job.clone();
    for min_kinds in [MinKinds::default(), MinKinds::All] {
        job.policy.min_kinds = min_kinds;
        let input = PlanInput { job: &job, model: &loaded.model, cluster, profile };
        let planned = hgct_planner::plan(&input, &Budget::default())?;
        if !planned.plan.ranks.iter().any(|rank| is_adapter(cluster, &rank.device)) {
            eprintln!("with Vulkan: the planner leaves the software adapter out of its choice");
            continue;
        }
        eprintln!("with Vulkan:\n{}", planned.explanation);
        return Ok(Candidate {
            name: "with Vulkan".into(),
            plan: Arc::new(planned.plan.clone()),
            planned,
            among: ids(cluster),
            outside: true,
        });
    }
    bail!("no plan has a part for the software adapter")
}

fn is_adapter(cluster: &ClusterSpec, id: &DeviceId) -> bool {
    cluster.device(id).is_some_and(|(_, device)| is_software_adapter(device))
}

fn ids(cluster: &ClusterSpec) -> Vec<DeviceId> {
    cluster.devices().map(|(_, device)| device.id.clone()).collect()
}

/// The global batch whose plan is nearest to what the devices could compute.
pub(super) fn divided_best(loaded: &LoadedJob, cluster: &ClusterSpec, profile: &Profile) -> u32 {
    let mut best: Option<(f64, u32)> = None;
    // Multiples of the largest micro-batch, so that the forced pipeline can use it.
    let largest = loaded.job.policy.micro_batches.iter().max().copied().unwrap_or(1);
    for global_batch in BATCHES.filter(|batch| batch.is_multiple_of(largest)) {
        let mut job = loaded.job.clone();
        job.recipe.global_batch = global_batch;
        let input = PlanInput { job: &job, model: &loaded.model, cluster, profile };
        let budget = Budget { nodes: 1_000_000, simulations: 100, stop: None };
        let (plan, explanation) = match hgct_planner::plan(&input, &budget) {
            Ok(Planned { plan, explanation, .. }) => (plan, explanation),
            Err(error) => {
                eprintln!("{global_batch} samples a step have no plan: {error}");
                continue;
            }
        };
        let micro_batches: u32 = plan.pipelines.iter().map(|pipeline| pipeline.num_micro_batches).sum();
        let reached = explanation.bound_ns as f64 / explanation.step_ns as f64;
        if micro_batches <= MAX_MICRO_BATCHES && best.is_none_or(|(most, _)| reached > most) {
            best = Some((reached, global_batch));
        }
    }
    let Some((reached, global_batch)) = best else {
        let given = loaded.job.recipe.global_batch;
        eprintln!("no larger batch has a plan of at most {MAX_MICRO_BATCHES} micro-batches: {given} samples");
        return given;
    };
    eprintln!("{global_batch} samples a step: its plan is at {:.1} % of its bound", 100.0 * reached);
    global_batch
}

/// The planner's choice, forced data-parallel, forced pipeline; equal ones are one.
pub(super) fn candidates(
    loaded: &LoadedJob,
    cluster: &ClusterSpec,
    profile: &Profile,
    quick: bool,
) -> Result<Vec<Candidate>> {
    let shapes: &[(&str, PlanShape)] = if quick {
        &[("planner", PlanShape::Any)]
    } else {
        &[
            ("planner", PlanShape::Any),
            ("data-parallel", PlanShape::DataParallel),
            ("pipeline", PlanShape::Pipeline),
        ]
    };
    let mut found: Vec<Candidate> = Vec::new();
    for (name, shape) in shapes {
        let mut job = loaded.job.clone();
        job.policy.shape = *shape;
        if *shape == PlanShape::Pipeline {
            // At least 16 micro-batches, and each as large as that allows: a kind that has waited
            // ends its work early in a period of its quota, which a long action feels less.
            let batch = job.recipe.global_batch;
            let fits = |size: &&u32| batch.is_multiple_of(**size) && batch / **size >= 16;
            let largest = job.policy.micro_batches.iter().filter(fits).max().copied();
            job.policy.micro_batches = largest.into_iter().collect();
        }
        let input = PlanInput { job: &job, model: &loaded.model, cluster, profile };
        let planned = hgct_planner::plan(&input, &Budget::default())?;
        eprintln!("{name}:\n{}", planned.explanation);
        let same = |known: &&mut Candidate| {
            known.plan.pipelines == planned.plan.pipelines && known.plan.stages == planned.plan.stages
        };
        if let Some(known) = found.iter_mut().find(same) {
            known.name = format!("{} = {name}", known.name);
            continue;
        }
        let (plan, among) = (Arc::new(planned.plan.clone()), ids(cluster));
        found.push(Candidate { name: (*name).into(), plan, planned, among, outside: false });
    }
    Ok(found)
}

/// For each device a plan of its own: its best micro-batch, and about its share of the global batch,
/// so that the optimizer weighs as much as it does together.
pub(super) fn alone_plans(
    loaded: &LoadedJob,
    cluster: &ClusterSpec,
    profile: &Profile,
) -> Result<Vec<(DeviceSpec, Plan)>> {
    let mut speeds = Vec::new();
    for (node, device) in cluster.devices() {
        let row = profile.device(&device.id).ok_or_else(|| anyhow!("{} was not measured", device.id))?;
        let seconds = |size: u32| -> Option<f64> {
            let mut ns = 0;
            for layer in 0..loaded.model.num_placeable_layers() {
                let row = row.layer(loaded.model.layer_kind(layer), size)?;
                ns += row.forward.median_ns + row.backward.median_ns;
            }
            Some((ns + 2 * row.action_overhead_ns) as f64 / 1e9)
        };
        let best = row
            .micro_batches()
            .into_iter()
            .filter_map(|size| Some((size, f64::from(size) / seconds(size)?)))
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .ok_or_else(|| anyhow!("{} has no complete micro-batch size", device.id))?;
        speeds.push((node.name.clone(), device.clone(), best));
    }
    let total: f64 = speeds.iter().map(|(_, _, (_, speed))| speed).sum();
    let plan = |(node, device, (size, speed)): (hgct_core::ids::NodeId, DeviceSpec, (u32, f64))| {
        let share = f64::from(loaded.job.recipe.global_batch) * speed / total;
        let number = ((share / f64::from(size)).round() as u32).max(1);
        let layers = loaded.model.num_placeable_layers();
        let rank = PlanRank {
            device: device.id.clone(),
            kind: device.kind.clone(),
            node,
            grant: device.grant.clone(),
        };
        let plan = PlanBuilder::new(loaded.model.clone(), loaded.job.recipe.seq_len, size * number)
            .rank(rank)
            .pipeline(size, number, &[(Rank(0), layers)])
            .build()?;
        Ok((device, plan))
    };
    speeds.into_iter().map(plan).collect()
}

/// The plan of one device with two micro-batches a step.
pub(super) fn shortened(plan: &Plan) -> Result<Plan> {
    let micro_batch = plan.pipelines[0].micro_batch;
    let layers = plan.model.num_placeable_layers();
    let short = PlanBuilder::new(plan.model.clone(), plan.seq_len, 2 * micro_batch)
        .rank(plan.ranks[0].clone())
        .pipeline(micro_batch, 2, &[(Rank(0), layers)]);
    Ok(short.build()?)
}
