//! From forms and counts to a layout: micro-batches, exact price, and small improvements.

use crate::instance::{Layout, Priced, check, price};

use super::Meter;
use super::form::{Form, Placed};
use super::table::Table;

/// Forms with how many pipelines of each.
pub(crate) type Crew = Vec<(Form, u32)>;

/// A layout with its price.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settled {
    pub(crate) layout: Layout,
    pub(crate) priced: Priced,
    pub(crate) crew: Crew,
}

impl Settled {
    pub(crate) fn seconds(&self) -> f64 {
        self.priced.iteration_s
    }
}

/// Divides the global batch among the pipelines so that the slowest is as fast as can be, and prices
/// the result; `None` if the batch cannot be divided so.
pub(crate) fn settle(table: &Table<'_>, crew: &Crew) -> Option<Settled> {
    let layout = divide(table, crew)?;
    let priced = price(table.instance, &layout);
    priced.iteration_s.is_finite().then(|| Settled { layout, priced, crew: crew.clone() })
}

/// The least time in which the pipelines do a whole step, without update and exchange.
pub(crate) fn least_seconds(table: &Table<'_>, crew: &Crew) -> f64 {
    let batch = u64::from(table.instance.global_batch);
    let done = |seconds: f64| -> u64 {
        crew.iter().map(|(form, count)| u64::from(*count) * form.samples(table, seconds)).sum()
    };
    let one = |form: &Form| form.seconds(u64::from(table.instance.global_batch).next_multiple_of(form.grain));
    let mut high = crew.iter().map(|(form, _)| one(form)).fold(f64::INFINITY, f64::min);
    let mut low = 0.0;
    if !high.is_finite() || done(high) < batch {
        return f64::INFINITY;
    }
    for _ in 0..48 {
        let middle = f64::midpoint(low, high);
        if done(middle) >= batch {
            high = middle;
        } else {
            low = middle;
        }
        if high - low < 1e-10 * high {
            break;
        }
    }
    // Up to the next end of a micro-batch, so that rounding below loses none.
    high * (1.0 + 1e-11)
}

/// Layout in the least time in which micro-batches sum to the batch: mostly the least time in which
/// they reach it; where unlike sizes leave a remainder, one of the next ends of a micro-batch.
fn divide(table: &Table<'_>, crew: &Crew) -> Option<Layout> {
    let mut seconds = least_seconds(table, crew);
    for _ in 0..MAX_ENDS {
        if !seconds.is_finite() {
            return None;
        }
        if let Some(layout) = divide_in(table, crew, seconds) {
            return Some(layout);
        }
        // The next end of any micro-batch.
        let next = |form: &Form| form.seconds(form.micro_batches(seconds) + form.grain);
        seconds = crew.iter().map(|(form, _)| next(form)).fold(f64::INFINITY, f64::min) * (1.0 + 1e-11);
    }
    None
}

/// Ends of micro-batches that are tried for a sum that fits.
const MAX_ENDS: u32 = 64;

fn divide_in(table: &Table<'_>, crew: &Crew, seconds: f64) -> Option<Layout> {
    let batch = u64::from(table.instance.global_batch);
    // Rows: form, pipelines, micro-batches.
    let mut rows: Vec<(usize, u64, u64)> = crew
        .iter()
        .enumerate()
        .map(|(at, (form, count))| (at, u64::from(*count), form.micro_batches(seconds)))
        .filter(|(_, count, num)| *count > 0 && *num > 0)
        .collect();
    let size = |at: usize| u64::from(table.micro_batches[crew[at].0.size]);
    let total: u64 = rows.iter().map(|(at, count, num)| size(*at) * count * num).sum();
    let mut excess = total.checked_sub(batch)?;
    // Largest micro-batches first, so that small ones make up the remainder; of these the pipelines
    // that end last.
    let mut order: Vec<usize> = (0..rows.len()).collect();
    let ends = |row: &(usize, u64, u64)| crew[row.0].0.seconds(row.2);
    order.sort_by(|a, b| {
        size(rows[*b].0)
            .cmp(&size(rows[*a].0))
            .then(ends(&rows[*b]).total_cmp(&ends(&rows[*a])))
            .then(a.cmp(b))
    });
    for at in order {
        let (form, count, num) = rows[at];
        // Every pipeline keeps a micro-batch, or as many as come together.
        let grain = crew[form].0.grain;
        let whole = (excess / size(form) / grain).min(count * (num / grain - 1));
        if whole == 0 {
            continue;
        }
        excess -= whole * size(form) * grain;
        let (each, more) = (whole / count, whole % count);
        rows[at] = (form, count - more, num - each * grain);
        if more > 0 {
            rows.push((form, more, num.checked_sub((each + 1) * grain)?));
        }
    }
    if excess > 0 {
        return None;
    }
    let mut templates: Vec<_> = rows
        .iter()
        .filter(|(_, count, num)| *count > 0 && *num > 0)
        .map(|(at, count, num)| crew[*at].0.template(table, *count as u32, *num as u32))
        .collect();
    templates.sort_by(|a, b| {
        (&a.stages, a.micro_batch, a.schedule, b.num_micro_batches).cmp(&(
            &b.stages,
            b.micro_batch,
            b.schedule,
            a.num_micro_batches,
        ))
    });
    templates.dedup_by(|b, a| {
        let alike = a.stages == b.stages
            && a.micro_batch == b.micro_batch
            && a.schedule == b.schedule
            && a.num_micro_batches == b.num_micro_batches;
        if alike {
            a.count += b.count;
        }
        alike
    });
    let shard_optimizer = table.instance.rules.shard_optimizer;
    Some(Layout { templates, shard_optimizer })
}

/// Shifts layers between neighbouring stages, and changes recompute, as long as the step gets faster.
pub(crate) fn polish(
    table: &Table<'_>,
    start: Settled,
    rounds: u32,
    meter: &mut Meter<'_>,
) -> Option<Settled> {
    let mut best = start;
    for _ in 0..rounds {
        let mut improved = false;
        for at in 0..best.crew.len() {
            for stages in neighbours(table, &best.crew[at].0) {
                meter.spend(50)?;
                let old = &best.crew[at].0;
                let Some(form) = Form::new(table, old.size, old.schedule, stages) else { continue };
                let mut crew = best.crew.clone();
                crew[at].0 = form;
                // Never slower in compute by more than an exchange could give back.
                let Some(found) = settle(table, &crew) else { continue };
                if found.seconds() < best.seconds() * (1.0 - 1e-9)
                    && check(table.instance, &found.layout).is_empty()
                {
                    best = found;
                    improved = true;
                }
            }
        }
        if !improved {
            break;
        }
    }
    Some(best)
}

/// Forms that differ in one boundary or one recompute.
fn neighbours(table: &Table<'_>, form: &Form) -> Vec<Vec<Placed>> {
    let mut all = Vec::new();
    for at in 0..form.stages.len() {
        let mut moved = form.stages.clone();
        if at > 0 {
            for by in [-1i32, 1] {
                let first = i32::from(form.stages[at].first) + by;
                let before = i32::from(form.stages[at - 1].first);
                let after = form.stages.get(at + 1).map_or(table.num_layers as i32, |s| i32::from(s.first));
                if before < first && first < after {
                    moved[at].first = first as u16;
                    all.push(moved.clone());
                }
            }
            moved.clone_from(&form.stages);
        }
        let own = &table.choices[usize::from(form.stages[at].choice)];
        if own.recompute
            && let Some(other) = table.choices.iter().position(|c| !c.recompute && c.is_alike(own))
        {
            moved[at].choice = other as u16;
            all.push(moved);
        }
    }
    all
}
