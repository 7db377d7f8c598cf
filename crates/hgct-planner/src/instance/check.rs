//! What is wrong with an instance or a layout, independent of the search.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use super::{Curve, Exchange, Group, Instance, Layout, Link, Schedule, Stage, Template, assign, price};

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fault {
    /// Where: `pool A100-40`, `template 2, stage 0`.
    pub place: String,
    /// What, with the numbers that disagree.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

/// What is wrong with an instance: lengths that disagree, numbers that are none, nothing to plan.
/// The search and the pricer rely on an instance without faults.
pub fn check_instance(instance: &Instance) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut say = |place: &str, message: String| faults.push(Fault { place: place.into(), message });
    if instance.degrees.first() != Some(&1) || !instance.degrees.is_sorted_by(|a, b| a < b) {
        say("degrees", format!("{:?} do not ascend from 1", instance.degrees));
    }
    if instance.global_batch == 0 {
        say("global_batch", "0 samples a step".into());
    }
    // A pool that has lost all its nodes may stay: its index means the same before and after.
    if instance.runs.is_empty() || instance.num_devices() == 0 {
        say("instance", "needs at least one layer and one device".into());
    }
    for (at, run) in instance.runs.iter().enumerate() {
        if run.class >= instance.classes.len() || run.count == 0 {
            say(&format!("run {at}"), format!("{} layers of class {}", run.count, run.class));
        }
    }
    let number = |x: f64| x.is_finite() && x >= 0.0;
    for class in &instance.classes {
        let place = format!("layer class {}", class.name);
        if class.memory.len() != instance.degrees.len() {
            say(&place, format!("{} rows for {} degrees", class.memory.len(), instance.degrees.len()));
        }
        let memory = class
            .memory
            .iter()
            .flat_map(|m| [m.state_bytes, m.optimizer_bytes, m.activation_bytes, m.recompute_bytes]);
        let own = [class.gradient_bytes, class.parameter_bytes, class.output_bytes];
        if let Some(bad) = memory.chain(own).find(|x| !number(*x)) {
            say(&place, format!("a size of {bad} bytes"));
        }
        if let (Some(of), Some(whole)) = (&class.experts, class.memory.first()) {
            let pairs = [
                (of.gradient_bytes, class.gradient_bytes),
                (of.parameter_bytes, class.parameter_bytes),
                (of.state_bytes, whole.state_bytes),
                (of.optimizer_bytes, whole.optimizer_bytes),
            ];
            if pairs.iter().any(|(part, whole)| !number(*part) || part > whole) {
                say(&place, "experts of more bytes than their layer".into());
            }
        }
    }
    for pool in &instance.pools {
        let place = format!("pool {}", pool.kind);
        if pool.devices_per_node == 0 {
            say(&place, format!("{} nodes of 0 devices", pool.nodes));
        }
        if pool.overhead_bytes.len() != instance.degrees.len() {
            say(&place, format!("{} overheads", pool.overhead_bytes.len()));
        }
        if !number(pool.memory_bytes) || pool.overhead_bytes.iter().any(|x| !number(*x)) {
            say(&place, "memory that is no number of bytes".into());
        }
        link(&pool.intra, &place, &mut say);
        for row in &pool.costs {
            let place =
                format!("{place}, tensor parallel {}, micro-batch {}", row.tensor_parallel, row.micro_batch);
            let num = instance.classes.len();
            let times = [&row.forward_s, &row.backward_s, &row.update_s];
            if times.iter().any(|t| t.len() != num) {
                say(&place, format!("not a time for each of {num} layer classes"));
            }
            if times.iter().flat_map(|t| t.iter()).any(|x| !number(*x)) || row.micro_batch == 0 {
                say(&place, "a time that is no number of seconds".into());
            }
            if instance.degree_index(row.tensor_parallel).is_none()
                || row.tensor_parallel > pool.devices_per_node
            {
                say(&place, format!("no degree of a node of {}", pool.devices_per_node));
            }
            if !divides_experts(row.tensor_parallel, row.expert_parallel, pool.devices_per_node) {
                let message =
                    format!("experts on {} of {} devices", row.expert_parallel, pool.devices_per_node);
                say(&place, message);
            }
        }
    }
    let num = instance.pools.len();
    if instance.inter.len() != num || instance.inter.iter().any(|row| row.len() != num) {
        say("inter", format!("no link for each pair of {num} pools"));
    }
    for (p, q) in (0..num).flat_map(|p| (0..num).map(move |q| (p, q))) {
        if let Some(of) = instance.inter.get(p).and_then(|row| row.get(q)) {
            let place = format!("link from {} to {}", instance.pools[p].kind, instance.pools[q].kind);
            link(of, &place, &mut say);
        }
    }
    if !(0.0..=1.0).contains(&instance.rules.exchange_overlap) || instance.rules.max_replicas == 0 {
        say("rules", "an overlap outside of 0 to 1, or no replica at all".into());
    }
    faults
}

/// Whether experts can be divided so: not beyond the tensor-parallel group, or among several of them in
/// one node.
fn divides_experts(tensor_parallel: u32, expert_parallel: u32, devices_per_node: u32) -> bool {
    let several = expert_parallel > tensor_parallel
        && expert_parallel <= devices_per_node
        && expert_parallel.is_multiple_of(tensor_parallel.max(1));
    expert_parallel == 1 || several
}

/// A link must have a row, and a positive speed at any size.
fn link(link: &Link, place: &str, say: &mut impl FnMut(&str, String)) {
    if link.rows.is_empty() {
        return say(place, "has no row".into());
    }
    for row in &link.rows {
        let fine = match row.curve {
            Curve::AlphaBeta { latency_s, bytes_per_s } => {
                latency_s.is_finite() && latency_s >= 0.0 && bytes_per_s > 0.0
            }
            Curve::Polynomial { smallest_bytes, .. } => {
                let sizes = [smallest_bytes, 1e6, 1e8, 1e9];
                smallest_bytes > 0.0 && sizes.iter().all(|bytes| row.curve.bytes_per_s(*bytes) > 0.0)
            }
        };
        if !fine {
            say(place, format!("{} to {} devices have no positive rate", row.from, row.to));
        }
    }
}

/// Everything that makes a layout none: layers that are missing, samples that do not sum to the
/// global batch, devices or memory that are not there, costs that are unknown.
pub fn check(instance: &Instance, layout: &Layout) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (index, template) in layout.templates.iter().enumerate() {
        of_template(instance, index, template, &mut faults);
    }
    let mut say = |message: String| faults.push(Fault { place: "layout".into(), message });
    if layout.num_samples() != u64::from(instance.global_batch) {
        say(format!(
            "{} samples a step where the global batch is {}",
            layout.num_samples(),
            instance.global_batch
        ));
    }
    if layout.shard_optimizer && !instance.rules.shard_optimizer {
        say("sharded optimizer state, which the rules do not allow".into());
    }
    if !faults.is_empty() {
        return faults;
    }
    devices(instance, layout, &mut faults);
    for (index, template) in price(instance, layout).templates.iter().enumerate() {
        for (at, stage) in template.stages.iter().enumerate() {
            let pool = &instance.pools[layout.templates[index].stages[at].pool];
            if stage.memory_bytes > pool.memory_bytes {
                let message = format!(
                    "needs {:.0} bytes of a {}'s {:.0}",
                    stage.memory_bytes, pool.kind, pool.memory_bytes
                );
                faults.push(Fault { place: place(index, at), message });
            }
        }
    }
    faults
}

fn place(template: usize, stage: usize) -> String {
    format!("template {template}, stage {stage}")
}

fn of_template(instance: &Instance, index: usize, template: &Template, faults: &mut Vec<Fault>) {
    let mut say = |place: String, message: String| faults.push(Fault { place, message });
    let whole = format!("template {index}");
    if template.count == 0 || template.micro_batch == 0 || template.num_micro_batches == 0 {
        say(whole.clone(), "no pipeline, or no micro-batch".into());
    }
    let known = template.schedule == Schedule::OneForwardOneBackward
        || instance.rules.schedules.contains(&template.schedule);
    if !known {
        say(whole.clone(), format!("the rules do not allow schedule {:?}", template.schedule));
    }
    let mut next = 0;
    for (at, stage) in template.stages.iter().enumerate() {
        if stage.first_layer != next || stage.end_layer <= next {
            say(
                place(index, at),
                format!(
                    "layers {} where {next} comes next",
                    crate::words::layers(stage.first_layer, stage.end_layer)
                ),
            );
        }
        next = next.max(stage.end_layer);
        if let Some(message) = of_stage(instance, template, stage) {
            say(place(index, at), message);
        }
    }
    if next != instance.num_layers() {
        say(whole.clone(), format!("ends at layer {next} of {}", instance.num_layers()));
    }
    if let Schedule::Interleaved(v) = template.schedule {
        let num = template.stages.len() as u32;
        if v < 2 || template.stages.iter().any(|s| s.end_layer < s.first_layer + v) {
            say(whole.clone(), format!("{v} virtual stages need as many layers on every stage"));
        }
        if num < 2 || !template.num_micro_batches.is_multiple_of(num.max(1)) {
            say(whole, format!("interleaving needs micro-batches in multiples of {num} stages"));
        }
    }
}

fn of_stage(instance: &Instance, template: &Template, stage: &Stage) -> Option<String> {
    let Some(pool) = instance.pools.get(stage.pool) else {
        return Some(format!("there is no pool {}", stage.pool));
    };
    if stage.replicas == 0 || stage.replicas > instance.rules.max_replicas {
        return Some(format!("{} replicas", stage.replicas));
    }
    if !divides_experts(stage.tensor_parallel, stage.expert_parallel, pool.devices_per_node) {
        let (e, t) = (stage.expert_parallel, stage.tensor_parallel);
        return Some(format!("experts on {e} devices, which groups of {t} in one node do not make up"));
    }
    if stage.expert_parallel > 1 && !matches!(instance.rules.exchange, Exchange::Hierarchical) {
        return Some("expert parallelism, whose exchange is priced as the hierarchical one only".into());
    }
    let groups = stage.replicas * stage.parts();
    if !template.micro_batch.is_multiple_of(groups) {
        return Some(format!("{} samples for {groups} groups that divide them", template.micro_batch));
    }
    if stage.recompute && !instance.rules.recompute {
        return Some("recompute, which the rules do not allow".into());
    }
    let micro_batch = template.micro_batch / groups;
    if instance.degree_index(stage.tensor_parallel).is_none()
        || pool.cost_with_experts(stage.tensor_parallel, stage.expert_parallel, micro_batch).is_none()
    {
        return Some(format!(
            "the cost of {} at tensor parallel {}, micro-batch {micro_batch}{} is not known",
            pool.kind,
            stage.tensor_parallel,
            if stage.expert_parallel > 1 {
                format!(", experts on {}", stage.expert_parallel)
            } else {
                String::new()
            }
        ));
    }
    None
}

/// What is wrong with the devices that somebody gave a sound layout: they must be a group for each
/// replica of each stage, in the order of [`assign`], and nobody's twice.
pub fn check_groups(instance: &Instance, layout: &Layout, groups: &[Group]) -> Option<Fault> {
    let fault = |message: String| Some(Fault { place: "groups".into(), message });
    let whose = |g: &Group| (g.template, g.pipeline, g.stage, g.replica, g.pool, g.devices);
    let wanted = assign(instance, layout).unwrap_or_default();
    if !wanted.iter().map(whose).eq(groups.iter().map(whose)) {
        return fault("are not those of the layout's stages".into());
    }
    let mut taken = BTreeSet::new();
    for group in groups {
        let (pool, end) = (&instance.pools[group.pool], group.first_device.saturating_add(group.devices));
        if group.node >= pool.nodes || end > pool.devices_per_node {
            return fault(format!("{} has no node {} with {end} devices", pool.kind, group.node));
        }
        for device in group.first_device..end {
            if !taken.insert((group.pool, group.node, device)) {
                return fault(format!("device {device} of {}-{} is there twice", pool.kind, group.node));
            }
        }
    }
    None
}

/// Groups must fit into nodes: largest first into the first node with room, which is exact where
/// each degree divides the next.
fn devices(instance: &Instance, layout: &Layout, faults: &mut Vec<Fault>) {
    for (index, pool) in instance.pools.iter().enumerate() {
        let mut groups: BTreeMap<u32, u64> = BTreeMap::new();
        for (template, stage) in layout
            .templates
            .iter()
            .flat_map(|t| t.stages.iter().map(move |s| (t, s)))
            .filter(|(_, s)| s.pool == index)
        {
            *groups.entry(stage.group_devices()).or_default() +=
                u64::from(template.count) * u64::from(stage.replicas);
        }
        let (sizes, num): (Vec<u32>, Vec<u64>) = groups.into_iter().unzip();
        if !fits(&sizes, &num, pool.nodes, pool.devices_per_node) {
            let used: u64 = num.iter().zip(&sizes).map(|(n, d)| n * u64::from(*d)).sum();
            let message = format!(
                "groups of {used} devices do not fit into {} nodes of {}",
                pool.nodes, pool.devices_per_node
            );
            faults.push(Fault { place: format!("pool {}", pool.kind), message });
        }
    }
}

/// Whether groups (how many of each size, ascending) fit into nodes.
pub(crate) fn fits(degrees: &[u32], groups: &[u64], nodes: u32, devices_per_node: u32) -> bool {
    // Nodes by how many devices are free, few distinct values however many nodes.
    let mut free = vec![0u64; devices_per_node as usize + 1];
    free[devices_per_node as usize] = u64::from(nodes);
    for (degree, num) in degrees.iter().zip(groups).rev() {
        let degree = *degree as usize;
        let mut left = *num;
        // The fullest node with room first.
        for room in degree..free.len() {
            let per_node = (room / degree) as u64;
            let whole = free[room].min(left / per_node);
            free[room] -= whole;
            free[room - degree * per_node as usize] += whole;
            left -= whole * per_node;
            if left > 0 && left < per_node && free[room] > 0 {
                free[room] -= 1;
                free[room - degree * left as usize] += 1;
                left = 0;
            }
            if left == 0 {
                break;
            }
        }
        if left > 0 {
            return false;
        }
    }
    true
}
