//! Exchange and update after the backwards, and the whole as a timeline.

use std::ops::Range;

use hgct_core::ids::{DeviceId, Rank};
use hgct_core::plan::StageId;
use hgct_core::schedule::{Action, Operation};
use hgct_core::timeline::{ActionSpan, RankTimeline, Timeline, TimelineSource, TransferSpan};

use super::order::OpKind;
use super::place::{Places, Unit};
use super::run::{Computed, Machine};
use super::{Simulated, ns};
use crate::instance::{Group, Instance, Layout, Schedule, exchange_groups};

/// What a unit does after its last backward.
#[derive(Debug, Clone, Default)]
struct Tail {
    reduces: Vec<(u64, u64)>,
    update: (u64, u64),
}

/// Layers whose gradients travel together.
struct Exchange {
    /// Units that hold them.
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
    // As `price` sees it: without overlap nobody begins before all are done.
    let ready = |unit: usize, layers: &Range<u32>| {
        if overlap <= 0.0 {
            return pipeline_ns;
        }
        let of = &places.units[unit];
        let template = &layout.templates[of.template];
        let stage = &template.stages[of.stage];
        let left = f64::from(layers.start - stage.first_layer) / f64::from(stage.num_layers());
        // Virtual stages and divided backwards finish their layers in another order.
        let left = if template.schedule == Schedule::OneForwardOneBackward { left } else { 0.0 };
        let last = computed[unit].iter().rfind(|span| span.op.kind == OpKind::Backward);
        let length = last.map_or(0, |span| span.end_ns - span.start_ns);
        let early = (length as f64 * left * overlap).floor() as u64;
        ends[unit] - early.min(ends[unit])
    };
    let holds = |unit: &Unit, layers: &Range<u32>| {
        let stage = &layout.templates[unit.template].stages[unit.stage];
        (stage.first_layer..stage.end_layer).contains(&layers.start)
    };
    // Last layers first, as backwards end.
    let mut waiting: Vec<Exchange> = exchange_groups(instance, layout)
        .into_iter()
        .rev()
        .filter(|(_, seconds)| *seconds > 0.0)
        .map(|(layers, seconds)| {
            let holders: Vec<usize> =
                (0..places.units.len()).filter(|unit| holds(&places.units[*unit], &layers)).collect();
            let start = holders.iter().map(|unit| ready(*unit, &layers)).max().unwrap_or(0);
            Exchange { holders, start, length: ns(seconds) }
        })
        .collect();
    let exchange_ns: u64 = waiting.iter().map(|group| group.length).sum();
    // Whichever can begin first does: groups that share no device exchange at the same time.
    let mut exchanging = vec![0u64; places.units.len()];
    while let Some(next) = (0..waiting.len()).min_by_key(|at| waiting[*at].start) {
        let Exchange { holders, start, length } = waiting.remove(next);
        let end = start + length;
        for unit in &holders {
            exchanging[*unit] = end;
            free[*unit] = free[*unit].max(end);
            tails[*unit].reduces.push((start, end));
        }
        for group in &mut waiting {
            let busy = group.holders.iter().map(|unit| exchanging[*unit]).max().unwrap_or(0);
            group.start = group.start.max(busy);
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
        let divided = layout.templates[unit.template].schedule == Schedule::ZeroBubble;
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
