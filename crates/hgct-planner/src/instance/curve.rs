//! Seconds to move bytes.

use serde::{Deserialize, Serialize};

/// Seconds as a function of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Curve {
    /// Latency and rate.
    AlphaBeta {
        /// Seconds that every message takes.
        latency_s: f64,
        /// Bytes a second after that.
        bytes_per_s: f64,
    },
    /// A fitted bandwidth: `a·x² + b·x + c` GB/s (1e9 bytes) with `x = log2(bytes / 1e6)`, never above
    /// `cap_bytes_per_s`.
    Polynomial {
        /// Of x².
        a: f64,
        /// Of x.
        b: f64,
        /// Constant.
        c: f64,
        /// The smallest that was measured: where the fit gives zero or less, messages move at this
        /// size's bandwidth.
        smallest_bytes: f64,
        /// The fastest that was measured; infinite where the fit is used as it is.
        #[serde(default = "infinite", skip_serializing_if = "is_infinite")]
        cap_bytes_per_s: f64,
    },
}

fn infinite() -> f64 {
    f64::INFINITY
}

// The signature is serde's.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_infinite(x: &f64) -> bool {
    x.is_infinite()
}

impl Curve {
    /// Seconds that a message takes; none for no bytes.
    pub fn seconds(&self, bytes: f64) -> f64 {
        if bytes <= 0.0 {
            return 0.0;
        }
        match self {
            Self::AlphaBeta { latency_s, bytes_per_s } => latency_s + bytes / bytes_per_s,
            Self::Polynomial { .. } => bytes / self.bytes_per_s(bytes),
        }
    }

    /// Effective rate of a message of that size.
    pub fn bytes_per_s(&self, bytes: f64) -> f64 {
        match self {
            Self::AlphaBeta { .. } => bytes / self.seconds(bytes),
            Self::Polynomial { a, b, c, smallest_bytes, cap_bytes_per_s } => {
                let fit = |bytes: f64| {
                    let x = (bytes / 1e6).log2();
                    (a * x * x + b * x + c) * 1e9
                };
                let rate = fit(bytes);
                (if rate > 0.0 { rate } else { fit(*smallest_bytes) }).min(*cap_bytes_per_s)
            }
        }
    }
}

/// A link whose speed depends on how many devices at each end use it together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Link {
    /// Rows in ascending order of devices; at least one.
    pub rows: Vec<LinkRow>,
}

/// The link when `from` devices send to `to` devices.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkRow {
    /// Devices of the sending node.
    pub from: u32,
    /// Devices of the receiving node.
    pub to: u32,
    /// Seconds for all bytes that they send together.
    pub curve: Curve,
}

impl Link {
    /// A link that is the same for any number of devices.
    pub fn uniform(curve: Curve) -> Self {
        Self { rows: vec![LinkRow { from: 1, to: 1, curve }] }
    }

    /// The row for `from` to `to` devices: the last whose devices are not more than these, else the
    /// first.
    pub fn curve(&self, from: u32, to: u32) -> Option<&Curve> {
        self.rows
            .iter()
            .filter(|row| row.from <= from && row.to <= to)
            .max_by_key(|row| (row.from, row.to))
            .or_else(|| self.rows.first())
            .map(|row| &row.curve)
    }

    /// Seconds for `bytes` in all from `from` to `to` devices; infinite where there is no link.
    pub fn seconds(&self, from: u32, to: u32, bytes: f64) -> f64 {
        self.curve(from, to).map_or(f64::INFINITY, |curve| curve.seconds(bytes))
    }
}
