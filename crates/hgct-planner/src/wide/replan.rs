//! What to do when nodes are lost: keep what runs, move onto spare devices, fill in, or begin anew.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::instance::{Fault, Group, Instance, Layout, Priced, Stage, Template, assign, check, price};

use super::form::{Form, Placed};
use super::moves::Held;
use super::settle::{Crew, settle};
use super::table::Table;
use super::{Effort, Found, find};

/// A way to go on, with what it costs and what it gives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Way {
    /// `keep` (pipelines without a lost device, other micro-batches), `move` (the parent's layout, what
    /// stood on lost nodes on spare ones of their kind), `fill` (what is kept, and new pipelines on
    /// devices that are free), or `anew` (the best layout of what is left).
    pub name: String,
    /// The layout; pools and nodes are those of [`Replan::instance`].
    pub layout: Layout,
    /// Its devices: pipelines that stay keep theirs.
    pub groups: Vec<Group>,
    /// Its price.
    pub priced: Priced,
    /// Pipelines whose devices and layers stay as they are.
    pub kept_pipelines: u64,
    /// State that devices must receive: layers that they do not hold yet, and optimizer state that
    /// fewer holders divide among them.
    pub moved_bytes: f64,
    /// Seconds that this takes, all nodes at once, each over its link.
    pub moved_s: f64,
    /// `moved_s` and the steps that were asked for.
    pub total_s: f64,
}

/// What can be done, and what is best over the steps that were asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Replan {
    /// The problem without the lost nodes.
    pub instance: Instance,
    /// All ways that fit, the best first; empty where none does.
    pub ways: Vec<Way>,
    /// Step of the parent before the loss.
    pub before_s: f64,
    /// The search for what is left, whose bound holds for every way; absent without a loss.
    pub anew: Option<Found>,
}

/// Replans a layout after `lost` nodes (pool, node of the pool), to be used for `steps` steps. The fewer,
/// the less it is worth to move. `groups` are the parent's devices; without them those of [`assign`].
/// Without a loss the parent is the answer.
pub fn replan(
    instance: &Instance,
    parent: &Layout,
    groups: Option<&[Group]>,
    lost: &[(usize, u32)],
    steps: u64,
    effort: &Effort<'_>,
) -> std::result::Result<Replan, Vec<Fault>> {
    let faults = check(instance, parent);
    let groups = groups.map_or_else(|| assign(instance, parent).unwrap_or_default(), <[Group]>::to_vec);
    let lost: BTreeSet<(usize, u32)> = lost.iter().copied().collect();
    if !faults.is_empty() {
        return Err(faults);
    }
    let mut left = instance.clone();
    for (pool, node) in &lost {
        let Some(pool) = left.pools.get_mut(*pool).filter(|_| *node < instance.pools[*pool].nodes) else {
            let message = format!("there is no node {node} in pool {pool}");
            return Err(vec![Fault { place: "lost".into(), message }]);
        };
        pool.nodes -= 1;
    }
    // Pipelines of each template that lost a device.
    let hit: BTreeSet<(usize, u32)> = groups
        .iter()
        .filter(|g| lost.contains(&(g.pool, g.node)))
        .map(|g| (g.template, g.pipeline))
        .collect();
    let mut kept = parent.clone();
    for (at, template) in kept.templates.iter_mut().enumerate() {
        template.count -= hit.iter().filter(|(t, _)| *t == at).count() as u32;
    }
    kept.templates.retain(|t| t.count > 0);
    let held = Held::new(instance, parent, &groups, &lost);
    let mut ways = Vec::new();
    let mut offer = |name: &str, layout: Layout| {
        if !check(&left, &layout).is_empty() {
            return;
        }
        let Some(moves) = held.place(&left, &layout) else { return };
        let priced = price(&left, &layout);
        ways.push(Way {
            name: name.into(),
            total_s: moves.seconds + steps as f64 * priced.iteration_s,
            groups: moves.groups,
            kept_pipelines: moves.kept_pipelines,
            moved_bytes: moves.bytes,
            moved_s: moves.seconds,
            layout,
            priced,
        });
    };
    if lost.is_empty() {
        offer("keep", parent.clone());
        return Ok(Replan {
            ways,
            before_s: price(instance, parent).iteration_s,
            instance: left,
            anew: None,
        });
    }
    // The least change: it fits where the nodes that are left have room for what the lost ones held.
    offer(if hit.is_empty() { "keep" } else { "move" }, parent.clone());
    let table = Table::new(&left, |_, _| true);
    // At best every device holds each layer: `offer` checks what each layout shares.
    if left.rules.shard_optimizer {
        table.shards.set(left.num_devices() as f64);
    }
    let survivors = crew_of(&table, &kept);
    if let (false, Some(settled)) = (hit.is_empty(), settle(&table, &survivors)) {
        offer("keep", settled.layout);
    }
    if let Some(settled) = fill_in(&left, &kept, effort).and_then(|new| {
        let mut crew = survivors.clone();
        crew.extend(crew_of(&table, &new));
        settle(&table, &crew)
    }) {
        offer("fill", settled.layout);
    }
    let anew = find(&left, None, effort)?;
    if let Some((layout, _)) = &anew.best {
        offer("anew", layout.clone());
    }
    ways.sort_by(|a, b| a.total_s.total_cmp(&b.total_s).then(a.moved_bytes.total_cmp(&b.moved_bytes)));
    Ok(Replan { ways, before_s: price(instance, parent).iteration_s, instance: left, anew: Some(anew) })
}

/// New pipelines on the devices that the kept ones leave free.
fn fill_in(left: &Instance, kept: &Layout, effort: &Effort<'_>) -> Option<Layout> {
    let used = kept.devices_used(left.pools.len());
    let mut free = left.clone();
    for (pool, used) in free.pools.iter_mut().zip(used) {
        // Whole nodes only: part of one may not be contiguous.
        let taken = used.div_ceil(u64::from(pool.devices_per_node)) as u32;
        pool.nodes = pool.nodes.saturating_sub(taken);
    }
    if free.num_devices() == 0 {
        return None;
    }
    // Their part of the batch: by devices, in whole micro-batches of the parent's.
    let (all, own) = (left.num_devices(), free.num_devices());
    let size = kept.templates.iter().map(|t| t.micro_batch).max().unwrap_or(1);
    let part = u64::from(left.global_batch) * own / all.max(1) / u64::from(size) * u64::from(size);
    free.global_batch = (part as u32).max(size);
    find(&free, None, effort).ok()?.best.map(|(layout, _)| layout)
}

/// The forms of a layout's templates; those that cannot be priced are left out.
fn crew_of(table: &Table<'_>, layout: &Layout) -> Crew {
    let choice = |stage: &Stage| {
        table.choices.iter().position(|c| {
            c.pool == stage.pool
                && c.tensor_parallel == stage.tensor_parallel
                && c.expert_parallel() == stage.expert_parallel
                && c.replicas == stage.replicas
                && c.recompute == stage.recompute
        })
    };
    let form = |template: &Template| {
        let size = table.micro_batches.iter().position(|b| *b == template.micro_batch)?;
        let placed =
            |stage: &Stage| Some(Placed { first: stage.first_layer as u16, choice: choice(stage)? as u16 });
        let stages = template.stages.iter().map(placed).collect::<Option<Vec<_>>>()?;
        Form::new(table, size, template.schedule, stages)
    };
    let mut crew: Crew = Vec::new();
    for template in &layout.templates {
        let Some(form) = form(template) else { continue };
        match crew.iter_mut().find(|(known, _)| *known == form) {
            Some((_, count)) => *count += template.count,
            None => crew.push((form, template.count)),
        }
    }
    crew
}
