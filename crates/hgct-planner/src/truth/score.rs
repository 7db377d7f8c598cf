//! Rows of predicted and measured, their mean errors, and whether refitting would have mattered.

use std::collections::BTreeMap;

use super::{Accelerator, Constants, Predicted, predict_layers, predict_transformer, published_layers};
use crate::Result;
use crate::tables::{MeasuredLayers, MeasuredTransformer, Tables};

/// All measured plans of a folder.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// The tables that the first kind of plans refers to.
    pub tables: Tables,
    /// Over tabled layers.
    pub layers: Vec<MeasuredLayers>,
    /// By sizes, on A100s.
    pub transformers: Vec<MeasuredTransformer>,
}

/// One measured plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Its name.
    pub id: String,
    /// What it belongs to: `mixed` kinds, one kind by name, `a100`.
    pub set: String,
    /// Our price.
    pub predicted: Predicted,
    /// The published price: seconds, and peak bytes.
    pub published: Option<(f64, f64)>,
    /// Seconds that it took.
    pub measured_s: f64,
    /// Peak of the fullest device.
    pub measured_peak_bytes: Option<f64>,
}

impl Row {
    /// Predicted over measured, less one.
    pub fn error(&self) -> f64 {
        self.predicted.iteration_s / self.measured_s - 1.0
    }

    /// The same of the published price.
    pub fn published_error(&self) -> Option<f64> {
        self.published.map(|(seconds, _)| seconds / self.measured_s - 1.0)
    }

    /// The same of peak memory.
    pub fn peak_error(&self) -> Option<f64> {
        Some(self.predicted.peak_bytes? / self.measured_peak_bytes? - 1.0)
    }

    /// The same of the published formula's.
    pub fn published_peak_error(&self) -> Option<f64> {
        Some(self.published?.1 / self.measured_peak_bytes? - 1.0)
    }

    /// Whether the run recorded a smaller peak than its own tables put on one device at once
    /// ([`Predicted::least_peak_bytes`]): no price can agree with both.
    pub fn contradicts_its_tables(&self) -> bool {
        let recorded = self.measured_peak_bytes.zip(self.predicted.least_peak_bytes);
        recorded.is_some_and(|(measured, least)| measured < least)
    }

    fn credible_peak_error(&self) -> Option<f64> {
        self.peak_error().filter(|_| !self.contradicts_its_tables())
    }
}

/// Errors of the rows of one set.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// The set.
    pub set: String,
    /// Its rows.
    pub rows: usize,
    /// Mean of the absolute errors of seconds.
    pub mean_error: f64,
    /// Mean of the signed ones.
    pub bias: f64,
    /// Mean of the absolute errors of the published price.
    pub published_mean_error: Option<f64>,
    /// Mean of the absolute errors of peak memory.
    pub peak_mean_error: Option<f64>,
    /// Median of these: one odd row does not move it.
    pub peak_median_error: Option<f64>,
    /// Mean over the rows whose recorded peak does not contradict their tables.
    pub credible_peak_mean_error: Option<f64>,
    /// Rows whose recorded peak does.
    pub contradictions: usize,
    /// Mean of the absolute errors of the published formula's peak memory.
    pub published_peak_mean_error: Option<f64>,
}

impl Measured {
    /// Prices every plan.
    pub fn rows(&self, constants: &Constants) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for row in &self.layers {
            rows.push(Row {
                id: row.id.clone(),
                set: set_of(row),
                predicted: predict_layers(&self.tables, constants, row)?,
                published: Some(published_layers(&self.tables, row)?),
                measured_s: row.iteration_s,
                measured_peak_bytes: (row.peak_bytes > 0.0).then_some(row.peak_bytes),
            });
        }
        let accelerator = Accelerator::a100();
        rows.extend(self.transformers.iter().map(|row| Row {
            id: row.id.clone(),
            set: "a100".into(),
            predicted: predict_transformer(&accelerator, constants, row),
            published: None,
            measured_s: row.iteration_s,
            measured_peak_bytes: None,
        }));
        Ok(rows)
    }
}

/// `mixed` if the plan has several kinds, else the one kind; a plan of mixed kinds' fleet that uses
/// one kind only does not exist in the published rows.
fn set_of(row: &MeasuredLayers) -> String {
    let mut kinds: Vec<&str> =
        row.stages.iter().flat_map(|stage| &stage.replicas).map(|replica| replica.kind.as_str()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    if kinds.len() > 1 { "mixed".into() } else { kinds.concat() }
}

/// A summary of every set, in order of name.
pub fn summaries(rows: &[Row]) -> Vec<Summary> {
    let mut sets: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        sets.entry(&row.set).or_default().push(row);
    }
    sets.into_iter()
        .map(|(set, rows)| {
            let all =
                |of: fn(&Row) -> Option<f64>| -> Vec<f64> { rows.iter().filter_map(|row| of(row)).collect() };
            let errors: Vec<f64> = rows.iter().map(|row| row.error()).collect();
            let peaks: Vec<f64> = all(Row::peak_error).into_iter().map(f64::abs).collect();
            Summary {
                set: set.into(),
                rows: rows.len(),
                mean_error: mean(errors.iter().map(|e| e.abs())).unwrap_or(0.0),
                bias: mean(errors.iter().copied()).unwrap_or(0.0),
                published_mean_error: mean(all(Row::published_error).into_iter().map(f64::abs)),
                peak_mean_error: mean(peaks.iter().copied()),
                peak_median_error: median(peaks),
                credible_peak_mean_error: mean(all(Row::credible_peak_error).into_iter().map(f64::abs)),
                contradictions: rows.iter().filter(|row| row.contradicts_its_tables()).count(),
                published_peak_mean_error: mean(all(Row::published_peak_error).into_iter().map(f64::abs)),
            }
        })
        .collect()
}

/// What the errors are on rows that a fit has not seen.
#[derive(Debug, Clone, PartialEq)]
pub struct CrossValidation {
    /// Set, mean absolute error with the constants as they are, and when all constants below are
    /// fitted to one half of the rows and judged on the other, both ways round.
    pub sets: Vec<(String, f64, f64)>,
    /// Constants and the two values that the halves would choose.
    pub fitted: Vec<(&'static str, f64, [f64; 2])>,
}

type Access = fn(&mut Constants) -> &mut f64;

/// What may be fitted, and to which multiples.
const FREE: [(&str, Access); 6] = [
    ("replica_spread", |c| &mut c.replica_spread),
    ("hop_s", |c| &mut c.hop_s),
    ("matrix_efficiency", |c| &mut c.matrix_efficiency),
    ("memory_efficiency", |c| &mut c.memory_efficiency),
    ("network_efficiency", |c| &mut c.network_efficiency),
    ("launch_s", |c| &mut c.launch_s),
];

/// Fits on every other row and judges on the rest, both ways round. Were the constants tuned to these
/// rows, the errors of unseen rows would be much larger than theirs.
pub fn cross_validate(measured: &Measured, constants: &Constants) -> Result<CrossValidation> {
    let half = |odd: usize| Measured {
        tables: measured.tables.clone(),
        layers: measured.layers.iter().skip(odd).step_by(2).cloned().collect(),
        transformers: measured.transformers.iter().skip(odd).step_by(2).cloned().collect(),
    };
    let halves = [half(0), half(1)];
    let fits = [fit(&halves[0], constants)?, fit(&halves[1], constants)?];
    let mut unseen = halves[1].rows(&fits[0])?;
    unseen.extend(halves[0].rows(&fits[1])?);
    let as_is = summaries(&measured.rows(constants)?);
    let sets = as_is
        .into_iter()
        .zip(summaries(&unseen))
        .map(|(known, fitted)| (known.set, known.mean_error, fitted.mean_error))
        .collect();
    let fitted = FREE
        .into_iter()
        .map(|(name, access)| {
            let value = |of: &Constants| *access(&mut of.clone());
            (name, value(constants), [value(&fits[0]), value(&fits[1])])
        })
        .collect();
    Ok(CrossValidation { sets, fitted })
}

/// Coordinate descent on the mean of the sets' mean absolute errors.
fn fit(measured: &Measured, start: &Constants) -> Result<Constants> {
    const FACTORS: [f64; 6] = [0.7, 0.85, 0.95, 1.05, 1.15, 1.4];
    let judge = |constants: &Constants| -> Result<f64> {
        let summaries = summaries(&measured.rows(constants)?);
        Ok(mean(summaries.iter().map(|set| set.mean_error)).unwrap_or(0.0))
    };
    let (mut best, mut least) = (*start, judge(start)?);
    for _ in 0..3 {
        for (_, access) in FREE {
            for factor in FACTORS {
                let mut tried = best;
                *access(&mut tried) *= factor;
                // Nothing moves faster than its nominal rate.
                if tried.matrix_efficiency.max(tried.memory_efficiency).max(tried.network_efficiency) > 1.0 {
                    continue;
                }
                let error = judge(&tried)?;
                if error < least {
                    (best, least) = (tried, error);
                }
            }
        }
    }
    Ok(best)
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, num) = values.fold((0.0, 0u32), |(sum, num), value| (sum + value, num + 1));
    (num > 0).then(|| sum / f64::from(num))
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let num = values.len();
    (num > 0).then(|| f64::midpoint(values[(num - 1) / 2], values[num / 2]))
}
