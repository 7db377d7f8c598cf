//! How far two outcomes are apart.

use crate::engine::Lease;

use super::Failure;

/// One tensor that an engine answered with, and which answer it was.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Value {
    pub(super) label: String,
    shape: Vec<u64>,
    values: Vec<f32>,
}

impl Value {
    /// Copies a lease's values.
    pub(super) fn of(label: String, lease: &Lease) -> Result<Self, Failure> {
        let values = lease.as_f32().map_err(|error| format!("{label}: {error}"))?.to_vec();
        Ok(Self { label, shape: lease.shape.clone(), values })
    }

    fn bits(&self) -> impl Iterator<Item = u32> {
        self.values.iter().map(|x| x.to_bits())
    }

    /// Largest difference to `expected`, relative to the largest of `expected`.
    fn error(&self, expected: &Self) -> f64 {
        let mut largest = 0f64;
        let mut difference = 0f64;
        for (found, expected) in self.values.iter().zip(&expected.values) {
            let apart = (f64::from(*found) - f64::from(*expected)).abs();
            largest = largest.max(f64::from(*expected).abs());
            // `max` would forget a NaN.
            difference = if apart.is_nan() { f64::INFINITY } else { difference.max(apart) };
        }
        if largest > 0.0 { difference / largest } else { difference }
    }
}

/// The largest error of all tensors and its place.
pub(super) fn largest_error(found: &[Value], expected: &[Value]) -> Result<(f64, String), Failure> {
    let mut worst = (0.0, "exact".to_owned());
    for (found, expected) in pairs(found, expected)? {
        let error = found.error(expected);
        if error > worst.0 {
            worst = (error, format!("largest in {}", expected.label));
        }
    }
    Ok(worst)
}

/// The first tensor whose bits differ.
pub(super) fn first_difference<'a>(
    found: &[Value],
    expected: &'a [Value],
) -> Result<Option<&'a str>, Failure> {
    let mut pairs = pairs(found, expected)?.into_iter();
    Ok(pairs.find(|(a, b)| !a.bits().eq(b.bits())).map(|(_, expected)| expected.label.as_str()))
}

/// Matches tensors by label; both must have the same ones, with the same shapes.
fn pairs<'a, 'b>(found: &'a [Value], expected: &'b [Value]) -> Result<Vec<(&'a Value, &'b Value)>, Failure> {
    for (at, value) in found.iter().enumerate() {
        if found[..at].iter().any(|earlier| earlier.label == value.label) {
            return Err(format!("{} came twice", value.label));
        }
        if !expected.iter().any(|expected| expected.label == value.label) {
            return Err(format!("{} came, but should not", value.label));
        }
    }
    expected
        .iter()
        .map(|expected| match found.iter().find(|found| found.label == expected.label) {
            None => Err(format!("{} did not come", expected.label)),
            Some(found) if found.shape != expected.shape => {
                Err(format!("{} has shape {:?}, must have {:?}", found.label, found.shape, expected.shape))
            }
            Some(found) => Ok((found, expected)),
        })
        .collect()
}
