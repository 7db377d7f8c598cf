//! Alike pipelines: what an expert would lay out by hand, and mostly the best on many devices.
//!
//! Each pool is divided evenly among r pipelines, and each pipeline goes through all pools, so that
//! the holders of a layer are of one kind and its exchange stays off the slow links between kinds.
//! What is free then is how many stages of which degree each pool has (a [`Mix`]). Mixes are compared
//! by a sum that leaves out memory and transfers, the best few are laid out and priced exactly:
//! stages of high demand for memory stand last, where few micro-batches are in flight.

use std::ops::Range;

use crate::instance::{Exchange, Schedule};

use super::Meter;
use super::form::{Form, PaceSearch, Placed};
use super::table::{StageTime, Table};

/// What alike pipelines are made for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Even<'s> {
    /// Devices of each pool for one pipeline.
    pub(crate) devices: &'s [u32],
    /// Index of the micro-batch size.
    pub(crate) size: usize,
    pub(crate) schedule: Schedule,
    /// Pipelines, and micro-batches of each, about.
    pub(crate) pipelines: u64,
    pub(crate) micro_batches: f64,
    /// Seconds beyond which a pipeline is of no use.
    pub(crate) enough: f64,
}

/// Stages of one (pool, degree).
#[derive(Debug, Clone, Copy)]
struct Kind {
    /// Without, and with recompute.
    choice: usize,
    again: Option<usize>,
    /// Seconds of a middle layer, and its forward's.
    layer: f64,
    fill: f64,
    /// Seconds of a middle layer's exchange.
    exchange: f64,
    /// Part of a device's free memory that a middle layer's activations take.
    pressure: f64,
    /// Devices of one pipeline that groups of this degree and larger ones can have: a node of 5 has room for
    /// one group of 4.
    most: u32,
}

/// How many stages of each kind.
type Mix = Vec<u32>;

/// The best forms on that many devices; `None` when out of nodes.
pub(crate) fn make(table: &Table<'_>, even: &Even<'_>, meter: &mut Meter<'_>) -> Option<Vec<Form>> {
    let kinds = kinds(table, even);
    if kinds.is_empty() {
        return Some(Vec::new());
    }
    let mut forms = Vec::new();
    for mix in mixes(table, even, &kinds, meter)? {
        meter.spend(200 * u64::from(mix.iter().sum::<u32>()))?;
        forms.extend(lay(table, even, &kinds, &mix));
    }
    Some(forms)
}

fn kinds(table: &Table<'_>, even: &Even<'_>) -> Vec<Kind> {
    let middle = table.num_layers / 2;
    let usable = |at: &usize| {
        let of = &table.choices[*at];
        !of.recompute && of.replicas == 1 && of.devices <= even.devices[of.pool] && table.runs(*at, even.size)
    };
    (0..table.choices.len())
        .filter(usable)
        .map(|choice| {
            let own = &table.choices[choice];
            let (forward_s, backward_s) = table.compute(choice, even.size, middle, middle + 1);
            let again = table.choices.iter().position(|c| c.recompute && c.is_alike(own));
            let free = |in_flight| table.memory(choice, even.size, middle, middle + 1, in_flight);
            let pool = &table.instance.pools[own.pool];
            Kind {
                choice,
                again,
                layer: forward_s + backward_s,
                fill: table.layer_fill_s(even.schedule, choice, even.size, middle),
                exchange: exchange(table, even, choice),
                pressure: (free(1.0) - free(0.0)) / (forward_s + backward_s) / pool.memory_bytes,
                most: in_groups(even.devices[own.pool], pool.devices_per_node, own.degree),
            }
        })
        .collect()
}

/// Of so many devices, those that groups of a degree and larger ones can have.
fn in_groups(devices: u32, of_node: u32, degree: u32) -> u32 {
    let whole = u64::from(of_node - of_node % degree);
    (u64::from(devices) * whole / u64::from(of_node)) as u32
}

/// Seconds a middle layer takes to exchange among all pipelines, as long as all have it on this choice.
fn exchange(table: &Table<'_>, even: &Even<'_>, choice: usize) -> f64 {
    let instance = table.instance;
    let middle = table.num_layers / 2;
    let (of, pipelines) = (&table.choices[choice], even.pipelines as f64);
    let bytes = table.gradient[middle + 1] - table.gradient[middle];
    let pool = &instance.pools[of.pool];
    let link = &instance.inter[of.pool][of.pool];
    match instance.rules.exchange {
        Exchange::FlatRing { .. } => {
            let own = bytes / f64::from(of.degree) / pipelines;
            2.0 * (pipelines - 1.0) * link.seconds(1, 1, own)
        }
        Exchange::Hierarchical => {
            let nodes = (pipelines * f64::from(of.devices) / f64::from(pool.devices_per_node)).ceil();
            let own = 2.0 * bytes * (nodes - 1.0) / nodes;
            link.seconds(pool.devices_per_node, pool.devices_per_node, own)
        }
    }
}

/// The most promising mixes by their rough sums.
fn mixes(table: &Table<'_>, even: &Even<'_>, kinds: &[Kind], meter: &mut Meter<'_>) -> Option<Vec<Mix>> {
    let pools = even.devices.len();
    let degree = |at: usize| table.choices[kinds[at].choice].degree;
    let of_pool =
        |pool: usize| (0..kinds.len()).filter(move |k| table.choices[kinds[*k].choice].pool == pool);
    // What each pool can have: one degree, or two neighbouring ones; or nothing.
    let options: Vec<Vec<Vec<(usize, u32)>>> = (0..pools)
        .map(|pool| {
            let own: Vec<usize> = of_pool(pool).collect();
            let devices = even.devices[pool];
            let mut all = vec![Vec::new()];
            // What a degree leaves is for the ones below it.
            let rest = |mut used: u32, upto: usize, option: &mut Vec<(usize, u32)>| {
                for k in own[..upto].iter().rev() {
                    let num = kinds[*k].most.saturating_sub(used) / degree(*k);
                    option.push((*k, num));
                    used += num * degree(*k);
                }
            };
            for upto in 1..=own.len() {
                let mut option = Vec::new();
                rest(0, upto, &mut option);
                all.push(option);
            }
            for upto in 2..=own.len() {
                for quarter in 1..4 {
                    let of = degree(own[upto - 1]);
                    let wide = (devices * quarter / 4).min(kinds[own[upto - 1]].most) / of;
                    if wide > 0 {
                        let mut option = vec![(own[upto - 1], wide)];
                        rest(wide * of, upto - 1, &mut option);
                        all.push(option);
                    }
                }
            }
            all
        })
        .collect();
    let mut tried: Vec<((f64, f64), Mix)> = Vec::new();
    let sum = |rough: (f64, f64)| rough.0 + rough.1;
    let mut degrees: Vec<u32> = (0..kinds.len()).map(degree).collect();
    degrees.sort_unstable();
    degrees.dedup();
    for start in degrees {
        // As near to one degree everywhere as each pool can.
        let nearest = |pool: usize| {
            let near = |k: &usize| degree(*k).abs_diff(start);
            of_pool(pool).min_by_key(near).map_or(0, |k| 1 + of_pool(pool).position(|o| o == k).unwrap_or(0))
        };
        let mut chosen: Vec<usize> = (0..pools).map(nearest).collect();
        let mix_of = |chosen: &[usize]| {
            let mut mix = vec![0; kinds.len()];
            for (pool, option) in chosen.iter().enumerate() {
                for (k, num) in &options[pool][*option] {
                    mix[*k] += num;
                }
            }
            mix
        };
        let best = rough(table, even, kinds, &mix_of(&chosen));
        tried.push((best, mix_of(&chosen)));
        let mut best = sum(best);
        for _ in 0..3 {
            let before = best;
            for pool in 0..pools {
                for option in 0..options[pool].len() {
                    meter.spend(10)?;
                    let old = std::mem::replace(&mut chosen[pool], option);
                    let mix = mix_of(&chosen);
                    let both = rough(table, even, kinds, &mix);
                    let seconds = sum(both);
                    if both.0 < best * 1.05 {
                        tried.push((both, mix));
                    }
                    if seconds < best {
                        best = seconds;
                    } else {
                        chosen[pool] = old;
                    }
                }
            }
            if best >= before {
                break;
            }
        }
    }
    tried.retain(|(both, _)| both.0 < even.enough);
    // The exchange is a guess: some without it.
    tried.sort_by(|a, b| a.0.0.total_cmp(&b.0.0).then_with(|| a.1.cmp(&b.1)));
    tried.dedup_by(|a, b| a.1 == b.1);
    let mut best: Vec<Mix> = tried.iter().take(MIXES / 2).map(|(_, mix)| mix.clone()).collect();
    tried.sort_by(|a, b| sum(a.0).total_cmp(&sum(b.0)).then_with(|| a.1.cmp(&b.1)));
    for (both, mix) in tried {
        if best.len() >= MIXES || sum(both) >= even.enough {
            break;
        }
        if !best.contains(&mix) {
            best.push(mix);
        }
    }
    Some(best)
}

/// Mixes that are laid out exactly.
const MIXES: usize = 10;

/// Seconds of a mix that does not cover the layers.
const NONE: (f64, f64) = (f64::INFINITY, 0.0);

/// Rounded down, without a call into a library.
fn whole(x: f64) -> f64 {
    f64::from(x as u32)
}

/// Seconds of a pipeline without memory and transfers, all layers being alike, and of its exchange.
fn rough(table: &Table<'_>, even: &Even<'_>, kinds: &[Kind], mix: &Mix) -> (f64, f64) {
    let layers = table.num_layers as f64;
    let stages: u32 = mix.iter().sum();
    if stages == 0 || stages as usize * even.schedule.least_layers() > table.num_layers {
        return NONE;
    }
    let there: Vec<(f64, f64, &Kind)> = kinds
        .iter()
        .zip(mix)
        .filter(|(_, num)| **num > 0)
        .map(|(kind, num)| (f64::from(*num), 1.0 / kind.layer, kind))
        .collect();
    let covered = |pace: f64| -> f64 { there.iter().map(|(num, speed, _)| num * whole(pace * speed)).sum() };
    let speed: f64 = there.iter().map(|(num, speed, _)| num * speed).sum();
    let (mut low, mut high) = (layers / speed, layers / speed * 2.5);
    if covered(high) < layers {
        return NONE;
    }
    for _ in 0..9 {
        let middle = f64::midpoint(low, high);
        if covered(middle) >= layers { high = middle } else { low = middle }
    }
    let fill_of = |(_, speed, kind): &(f64, f64, &Kind)| whole(high * speed) * kind.fill;
    let all: f64 = there.iter().map(|of| of.0 * fill_of(of)).sum();
    // About that of the slowest, which its pace pays for.
    let fill = all - there.iter().map(fill_of).fold(0.0, f64::max);
    let exchange =
        there.iter().map(|(_, speed, kind)| whole(high * speed) * kind.exchange).fold(0.0, f64::max);
    // What covers more than it must is shortened.
    (even.micro_batches * high + fill * layers / covered(high), exchange)
}

/// Lays stages out, those that need much memory last, at the least pace that places all layers.
fn lay(table: &Table<'_>, even: &Even<'_>, kinds: &[Kind], mix: &Mix) -> Option<Form> {
    let mut order: Vec<usize> = (0..kinds.len()).filter(|k| mix[*k] > 0).collect();
    order.sort_by(|a, b| kinds[*a].pressure.total_cmp(&kinds[*b].pressure).then(a.cmp(b)));
    let stages: Vec<&Kind> =
        order.iter().flat_map(|k| std::iter::repeat_n(&kinds[*k], mix[*k] as usize)).collect();
    // Where memory is short, more time is of no use.
    fill(table, even, &stages, f64::INFINITY)?;
    let speed: f64 = stages.iter().map(|kind| 1.0 / kind.layer).sum();
    let low = table.num_layers as f64 / speed * 0.9;
    // What is laid out here is priced next, and moved from there: no need to be near.
    let search = PaceSearch { low, first: low * 1.3, high: f64::INFINITY, tries: 16, tolerance: 1e-3 };
    search.tightest(|pace| Form::new(table, even.size, even.schedule, fill(table, even, &stages, pace)?))
}

/// The least of a range that is fine, as all above it are, and the range's end; sought from a guess on.
fn least(range: Range<usize>, guess: usize, fine: impl Fn(usize) -> bool) -> usize {
    let Range { start: mut low, end: mut high } = range;
    let (guess, mut step) = (guess.clamp(low, high), 1);
    // Away from the guess in steps that double, until it is passed.
    if guess == high || fine(guess) {
        high = guess;
        while low < high {
            let next = high.saturating_sub(step).max(low);
            if !fine(next) {
                low = next + 1;
                break;
            }
            (high, step) = (next, 2 * step);
        }
    } else {
        low = guess + 1;
        while low + step <= high {
            let next = low + step - 1;
            if fine(next) {
                high = next;
                break;
            }
            (low, step) = (next + 1, 2 * step);
        }
    }
    while low < high {
        let middle = usize::midpoint(low, high);
        if fine(middle) { high = middle } else { low = middle + 1 }
    }
    high
}

/// Fills stages from the last to the first, each as long as pace and memory allow; `None` if layers
/// remain or too few are left.
fn fill(table: &Table<'_>, even: &Even<'_>, stages: &[&Kind], pace: f64) -> Option<Vec<Placed>> {
    let num = stages.len();
    let each = even.schedule.least_layers();
    let mut placed = Vec::with_capacity(num);
    let mut end = table.num_layers;
    for at in (0..num).rev() {
        let end_of = |at: usize| table.choices[stages[at].choice].end;
        let before = at.checked_sub(1).map(end_of);
        let after = (at + 1 < num).then(|| end_of(at + 1));
        let in_flight = even.schedule.in_flight(num, at);
        let fine = |choice: usize, first: usize| {
            let (forward, backward) = table.compute(choice, even.size, first, end);
            let own = table.choices[choice].end;
            let transfer =
                table.stage_transfer(even.size, (first, end), own, after, before, num, even.schedule);
            table.pace(StageTime { forward, backward, transfer }) <= pace
                && table.fits(choice, even.size, first, end, in_flight)
        };
        let longest = |choice: usize| {
            // Every stage before needs its layers too.
            let last = end.checked_sub(each).filter(|last| *last >= at * each)?;
            // Its pace alone says about how long it is.
            let guess = end.saturating_sub((pace / stages[at].layer) as usize);
            let first = least(at * each..last, guess, |first| fine(choice, first));
            (first < last || fine(choice, last)).then_some(first)
        };
        let plain = longest(stages[at].choice);
        // Recompute is of use only where memory is short.
        let short = |first: usize| !table.fits(stages[at].choice, even.size, first, end, in_flight);
        let again = match plain {
            Some(first) if first == at * each || !short(first - 1) => None,
            _ => stages[at].again.and_then(|choice| Some((longest(choice)?, choice))),
        };
        let (first, choice) = match (plain, again) {
            (Some(first), Some((other, choice))) if other < first => (other, choice),
            (Some(first), _) => (first, stages[at].choice),
            (None, again) => again?,
        };
        placed.push(Placed { first: first as u16, choice: choice as u16 });
        end = first;
    }
    placed.reverse();
    (end == 0).then_some(placed)
}

#[cfg(test)]
mod tests {
    use super::least;

    #[test]
    fn a_guess_changes_how_the_least_is_sought_and_not_what_is_found() {
        for low in 0..4 {
            for high in low..low + 12 {
                for from in low..=high {
                    for guess in 0..20 {
                        assert_eq!(least(low..high, guess, |at| at >= from), from, "{low}..{high} {guess}");
                    }
                }
            }
        }
    }
}
