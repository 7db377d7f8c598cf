//! What an engine says of itself, and what the conformance suite found.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::ids::{DeviceId, Kind};

/// What an engine can do, as it says itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(clippy::struct_excessive_bools, reason = "independent capabilities, each one answered by itself")]
pub struct EngineDescription {
    /// `torch`, `jax`, `paddle`, `mlx`, …
    pub engine: String,
    /// Version of the framework.
    pub framework_version: String,
    /// What the framework really runs on.
    pub device: String,
    /// Dtypes it computes in.
    pub dtypes: Vec<DType>,
    /// Whether gradients leave by layer or only by stage.
    pub granularity: Granularity,
    /// Whether backward can be split into inputs and weights.
    pub split_backward: bool,
    /// Whether it can compute activations again in backward.
    pub recompute: bool,
    /// Whether a layer can be cut over several devices.
    pub tensor_parallel: bool,
    /// Whether the same inputs give the same bits.
    pub deterministic: bool,
    /// Memory of the device, bytes, where the framework tells.
    pub memory_bytes: Option<u64>,
}

/// At which grain an engine reports final gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Granularity {
    /// Layer by layer.
    Layer,
    /// All of a stage at once.
    Stage,
}

/// The conformance suite's answer for one device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckReport {
    /// The device.
    pub device: DeviceId,
    /// Its kind.
    pub kind: Kind,
    /// `pass` only if no check failed.
    pub verdict: Verdict,
    /// One row a check.
    pub checks: Vec<CheckRow>,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckRow {
    /// Its name, kebab-case.
    pub name: String,
    /// What was found.
    pub verdict: Verdict,
    /// Largest error measured, where the check measures one (relative to the tensor's largest).
    pub error: Option<f64>,
    /// The largest error that passes.
    pub tolerance: Option<f64>,
    /// How long it took.
    pub seconds: f64,
    /// Figures or the reason, for people.
    pub message: String,
}

/// Outcome of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it must be.
    Pass,
    /// The engine says that it cannot do this, and need not.
    Skipped,
    /// Not as it must be.
    Fail,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pass => "pass",
            Self::Skipped => "skipped",
            Self::Fail => "FAIL",
        })
    }
}

impl fmt::Display for CheckReport {
    /// A table, one line a check.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figure = |x: Option<f64>| x.map_or_else(|| "-".into(), |x| format!("{x:.1e}"));
        writeln!(f, "{} ({}): {}", self.device, self.kind, self.verdict)?;
        writeln!(f, "  {:<20} {:<8} {:>8} {:>8} {:>7}", "check", "verdict", "error", "allowed", "seconds")?;
        for row in &self.checks {
            let CheckRow { name, verdict, seconds, message, .. } = row;
            let (error, allowed) = (figure(row.error), figure(row.tolerance));
            writeln!(f, "  {name:<20} {verdict:<8} {error:>8} {allowed:>8} {seconds:>7.2}  {message}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_line_a_check() {
        let row = |verdict, error| CheckRow {
            name: "block".into(),
            verdict,
            error,
            tolerance: error.map(|_| 1e-5),
            seconds: 0.25,
            message: "why".into(),
        };
        let report = CheckReport {
            device: DeviceId::new("local/torch:0").unwrap(),
            kind: Kind::new("cpu/torch").unwrap(),
            verdict: Verdict::Fail,
            checks: vec![row(Verdict::Fail, Some(0.5)), row(Verdict::Skipped, None)],
        };
        assert_eq!(
            report.to_string(),
            "local/torch:0 (cpu/torch): FAIL\n\
             \x20 check                verdict     error  allowed seconds\n\
             \x20 block                FAIL       5.0e-1   1.0e-5    0.25  why\n\
             \x20 block                skipped         -        -    0.25  why\n"
        );
    }
}
