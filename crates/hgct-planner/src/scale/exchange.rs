//! Exchange and update after the backwards, and the whole as a timeline.

use hgct_core::ids::{DeviceId, Rank};
use hgct_core::plan::StageId;
use hgct_core::schedule::{Action, Operation};
use hgct_core::timeline::{ActionSpan, RankTimeline, Timeline, TimelineSource, TransferSpan};

use super::order::OpKind;
use super::place::{Places, Unit};
use super::run::{Computed, Machine};
use super::{Simulated, ns};
use crate::instance::{Buckets, Group, Instance, Layout};

/// What a unit does after its last backward.
#[derive(Debug, Clone, Default)]
struct Tail {
    reduces: Vec<(u64, u64)>,
    update: (u64, u64),
}

/// A layer's exchange.
struct Exchange {
    /// Units that hold it.
    holders: Vec<usize>,
    /// When all holders are ready and free.
    start: u64,
    length: u64,
}

/// Adds exchange and update to what the machine has run.
pub(super) fn finish(
    instance: &Instance,
    layout: &Layout,
    places: &Places,
    machine: &Machine<'_>,
) -> Simulated {
    let computed = &machine.computed;
    let ends: Vec<u64> =
        computed.iter().map(|spans| spans.iter().map(|span| span.end_ns).max().unwrap_or(0)).collect();
    let pipeline_ns = ends.iter().copied().max().unwrap_or(0);
    let mut free = ends.clone();
    let mut tails = vec![Tail::default(); places.units.len()];
    let overlap = instance.rules.exchange_overlap;
    let buckets = Buckets::new(instance, layout);
    // By the rule of the price ([`Buckets`]); without overlap nobody begins before all are done.
    let ready = |unit: usize, layer: u32| {
        if overlap <= 0.0 {
            return pipeline_ns;
        }
        let of = &places.units[unit];
        let template = &layout.templates[of.template];
        let schedule = template.schedule;
        // Virtual stages divide what is left of a pass over the whole stage.
        let in_stage = (layer - template.stages[of.stage].first_layer) as usize;
        let left = buckets.left[of.template][of.stage][in_stage] * f64::from(schedule.virtual_stages());
        // All of a pass is left where the last layers have none of it.
        let chunk = (left as u32).min(schedule.virtual_stages() - 1);
        let left = left - f64::from(chunk);
        let kind = if schedule.divides() { OpKind::Weight } else { OpKind::Backward };
        let is_pass = |span: &&Computed| span.op.kind == kind && span.op.chunk == chunk;
        let Some(pass) = computed[unit].iter().rfind(is_pass) else { return ends[unit] };
        let left_ns = ((pass.end_ns - pass.start_ns) as f64 * left).floor() as u64;
        let early_ns = ends[unit] - (pass.end_ns - left_ns);
        ends[unit] - (early_ns as f64 * overlap).floor() as u64
    };
    let holds = |unit: &Unit, layer: u32| {
        let stage = &layout.templates[unit.template].stages[unit.stage];
        (stage.first_layer..stage.end_layer).contains(&layer)
    };
    // Last layers first, as backwards end.
    let mut waiting: Vec<Exchange> = (0..instance.num_layers())
        .zip(&buckets.seconds)
        .rev()
        .filter(|(_, seconds)| **seconds > 0.0)
        .map(|(layer, seconds)| {
            let holders: Vec<usize> =
                (0..places.units.len()).filter(|unit| holds(&places.units[*unit], layer)).collect();
            let start = holders.iter().map(|unit| ready(*unit, layer)).max().unwrap_or(0);
            Exchange { holders, start, length: ns(*seconds) }
        })
        .collect();
    let exchange_ns: u64 = waiting.iter().map(|layer| layer.length).sum();
    // Whichever can begin first does: layers that share no device are exchanged at the same time.
    let mut exchanging = vec![0u64; places.units.len()];
    while let Some(next) = (0..waiting.len()).min_by_key(|at| waiting[*at].start) {
        let Exchange { holders, start, length } = waiting.remove(next);
        let end = start + length;
        for unit in &holders {
            exchanging[*unit] = end;
            free[*unit] = free[*unit].max(end);
            let reduces = &mut tails[*unit].reduces;
            match reduces.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => reduces.push((start, end)),
            }
        }
        for layer in &mut waiting {
            let busy = layer.holders.iter().map(|unit| exchanging[*unit]).max().unwrap_or(0);
            layer.start = layer.start.max(busy);
        }
    }
    let mut update_ns = 0;
    for (at, unit) in places.units.iter().enumerate() {
        let length = ns(machine.priced[unit.template][unit.stage].update_s * unit.factor);
        let start = free[at].max(if overlap <= 0.0 { pipeline_ns } else { 0 });
        tails[at].update = (start, start + length);
        update_ns += length;
    }
    let step_ns = tails.iter().map(|tail| tail.update.1).max().unwrap_or(0).max(pipeline_ns);
    let busy = |spans: &[Computed]| spans.iter().map(|span| span.end_ns - span.start_ns).sum::<u64>();
    let roofline_ns = computed
        .iter()
        .zip(&tails)
        .map(|(spans, tail)| busy(spans) + (tail.update.1 - tail.update.0))
        .max()
        .unwrap_or(0);
    let serial_ns =
        computed.iter().map(|spans| busy(spans)).sum::<u64>() + machine.transfer_ns + exchange_ns + update_ns;
    let num_samples = places
        .pipelines
        .iter()
        .map(|p| u64::from(p.num_micro_batches) * u64::from(layout.templates[p.template].micro_batch))
        .sum();
    Simulated {
        step_ns,
        pipeline_ns,
        roofline_ns,
        serial_ns,
        contention_ns: machine.contention_ns,
        num_pipelines: places.pipelines.len(),
        num_samples,
        timeline: timeline(instance, layout, places, machine, &tails),
    }
}

/// A row a group of devices; a unit's groups do the same.
fn timeline(
    instance: &Instance,
    layout: &Layout,
    places: &Places,
    machine: &Machine<'_>,
    tails: &[Tail],
) -> Timeline {
    let mut first_rank = Vec::with_capacity(places.units.len());
    let mut next = 0;
    for unit in &places.units {
        first_rank.push(next);
        next += unit.groups.len() as u32;
    }
    let mut ranks = Vec::with_capacity(next as usize);
    for (at, unit) in places.units.iter().enumerate() {
        let pipeline = &places.pipelines[unit.pipeline];
        let divided = layout.templates[unit.template].schedule.divides();
        let action = |operation, micro_batch| Action { stage: StageId(at as u32), operation, micro_batch };
        let mut actions: Vec<ActionSpan> = machine.computed[at]
            .iter()
            .map(|span| {
                let operation = match span.op.kind {
                    OpKind::Forward => Operation::Forward,
                    OpKind::Backward if divided => Operation::BackwardInput,
                    OpKind::Backward => Operation::Backward,
                    OpKind::Weight => Operation::BackwardWeight,
                };
                let action = action(operation, pipeline.first_micro_batch + span.op.micro_batch);
                ActionSpan { step: 0, action, start_ns: span.start_ns, end_ns: span.end_ns }
            })
            .collect();
        let tail = &tails[at];
        let after = tail.reduces.iter().map(|span| (Operation::Reduce, *span));
        for (operation, (start_ns, end_ns)) in after.chain([(Operation::Update, tail.update)]) {
            actions.push(ActionSpan { step: 0, action: action(operation, 0), start_ns, end_ns });
        }
        actions.sort_by_key(|span| (span.start_ns, span.end_ns));
        for (replica, group) in unit.groups.iter().enumerate() {
            ranks.push(RankTimeline {
                rank: Rank(first_rank[at] + replica as u32),
                device: device(instance, *group),
                clock_offset_ns: 0,
                clock_uncertainty_ns: 0,
                actions: actions.clone(),
                transfers: Vec::new(),
            });
        }
    }
    for moved in &machine.moved {
        for (outgoing, own, peer) in [(true, moved.from, moved.to), (false, moved.to, moved.from)] {
            ranks[first_rank[own] as usize].transfers.push(TransferSpan {
                step: 0,
                peer: Rank(first_rank[peer]),
                outgoing,
                size_bytes: moved.bytes,
                start_ns: moved.start_ns,
                end_ns: moved.end_ns,
            });
        }
    }
    for rank in &mut ranks {
        rank.transfers.sort_by_key(|span| (span.start_ns, span.end_ns, span.peer, span.outgoing));
    }
    Timeline { format: Timeline::FORMAT, source: TimelineSource::Predicted, first_step: 0, ranks }
}

/// `KIND-NODE/DEVICE`, with what a name may not have left out.
fn device(instance: &Instance, group: Group) -> DeviceId {
    let kind = &instance.pools[group.pool].kind;
    let clean: String = kind
        .chars()
        .take(64)
        .map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' })
        .collect();
    let name = format!("{}-{}/{}", clean.trim_start_matches('.'), group.node, group.first_device);
    // The name above is made of allowed characters only.
    DeviceId::new(name).unwrap_or_else(|_| unreachable!("a device's name is made of allowed characters"))
}
