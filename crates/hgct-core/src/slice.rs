//! Logical slices: state is addressed by (tensor name, box, dtype, role), never by rank.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::model::TensorSpec;

/// What a slice's bytes mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// What engines compute with.
    Parameter,
    /// Sum over tokens of the loss gradient.
    Gradient,
    /// The parameter in the master dtype.
    Master,
    /// AdamW's first moment.
    M,
    /// AdamW's second moment.
    V,
}

impl Role {
    /// The name used in checkpoints.
    pub fn name(self) -> &'static str {
        match self {
            Self::Parameter => "parameter",
            Self::Gradient => "gradient",
            Self::Master => "master",
            Self::M => "m",
            Self::V => "v",
        }
    }
}

/// An axis-aligned box of a named tensor: `begin[d]..end[d]` in every dimension.
///
/// Plans of today cut dimension 0 alone, so that a slice is one contiguous range of elements;
/// tensor parallelism will cut others.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slice {
    /// Hugging Face name.
    pub tensor: String,
    /// First index in every dimension.
    pub begin: Vec<u64>,
    /// Index past the last in every dimension.
    pub end: Vec<u64>,
}

impl Slice {
    /// Rows `rows` of dimension 0, all of the others.
    pub fn rows_of(tensor: &TensorSpec, rows: Range<u64>) -> Self {
        let mut begin = vec![0; tensor.shape.len()];
        let mut end = tensor.shape.clone();
        begin[0] = rows.start;
        end[0] = rows.end;
        Self { tensor: tensor.name.clone(), begin, end }
    }

    /// The whole tensor.
    pub fn whole(tensor: &TensorSpec) -> Self {
        Self::rows_of(tensor, 0..tensor.rows())
    }

    /// Range in dimension 0.
    pub fn rows(&self) -> Range<u64> {
        self.begin[0]..self.end[0]
    }

    /// Extent in every dimension.
    pub fn shape(&self) -> Vec<u64> {
        self.begin.iter().zip(&self.end).map(|(b, e)| e - b).collect()
    }

    /// Elements in all.
    pub fn num_elements(&self) -> u64 {
        self.shape().iter().product()
    }

    /// Bytes in `dtype`.
    pub fn size_bytes(&self, dtype: DType) -> u64 {
        self.num_elements() * dtype.size_bytes()
    }

    /// The range of row-major elements of the whole tensor, if the box is cut along dimension 0
    /// only.
    pub fn element_range(&self, tensor: &TensorSpec) -> Option<Range<u64>> {
        let full = self.begin.iter().skip(1).all(|b| *b == 0)
            && self.end.iter().skip(1).eq(tensor.shape.iter().skip(1));
        full.then(|| self.begin[0] * tensor.row_elements()..self.end[0] * tensor.row_elements())
    }

    /// The common part with another slice of the same tensor, if there is one.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        if self.tensor != other.tensor || self.begin.len() != other.begin.len() {
            return None;
        }
        let begin: Vec<u64> = self.begin.iter().zip(&other.begin).map(|(a, b)| *a.max(b)).collect();
        let end: Vec<u64> = self.end.iter().zip(&other.end).map(|(a, b)| *a.min(b)).collect();
        begin.iter().zip(&end).all(|(b, e)| b < e).then(|| Self { tensor: self.tensor.clone(), begin, end })
    }
}

impl fmt::Display for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.tensor)?;
        for (d, (b, e)) in self.begin.iter().zip(&self.end).enumerate() {
            write!(f, "{}{b}..{e}", if d > 0 { ", " } else { "" })?;
        }
        write!(f, "]")
    }
}

/// Rows of one *update block* of a tensor: the grain at which ownership is cut and the squared
/// gradient norm is summed. It depends on the model alone, so neither the plan nor the choice of
/// owner changes a bit of the norm. At least 65,536 elements or one row, and about 4,096 blocks a
/// model at most.
pub fn block_rows(tensor: &TensorSpec, num_parameters: u64) -> u64 {
    let target = (num_parameters / 4096).max(65_536);
    (target / tensor.row_elements().max(1)).clamp(1, tensor.rows())
}

/// The update blocks of a tensor, as row ranges in order.
pub fn blocks(tensor: &TensorSpec, num_parameters: u64) -> Vec<Range<u64>> {
    let step = block_rows(tensor, num_parameters);
    (0..tensor.rows().div_ceil(step)).map(|i| i * step..((i + 1) * step).min(tensor.rows())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn blocks_partition_the_rows(rows in 1u64..5000, width in 1u64..600, parameters in 1u64..1_000_000_000) {
            let tensor = TensorSpec { name: "t".into(), shape: vec![rows, width] };
            let mut next = 0;
            for block in blocks(&tensor, parameters) {
                prop_assert_eq!(block.start, next);
                prop_assert!(block.end > block.start);
                next = block.end;
            }
            prop_assert_eq!(next, rows);
        }

        #[test]
        fn intersection_is_symmetric_and_inside(a in 0u64..9, b in 1u64..9, c in 0u64..9, d in 1u64..9) {
            let tensor = TensorSpec { name: "t".into(), shape: vec![20, 3] };
            let (x, y) = (Slice::rows_of(&tensor, a..a + b), Slice::rows_of(&tensor, c..c + d));
            let common = x.intersection(&y);
            prop_assert_eq!(&common, &y.intersection(&x));
            prop_assert_eq!(common.map_or(0, |s| s.end[0] - s.begin[0]), (a + b).min(c + d).saturating_sub(a.max(c)));
        }
    }
}
