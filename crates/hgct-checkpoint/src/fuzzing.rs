//! The header of a stranger's shard, for tests with random ones. No part of the interface.

use std::path::Path;

use hgct_core::dtype::DType;

use crate::header::{self, Tensor};
use crate::store::Object;
use crate::{Error, Result};

struct Bytes<'a>(&'a [u8]);

// The borrowed bytes live as long as the call that reads them.
impl Object for Bytes<'_> {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_range(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let end = (offset as usize).checked_add(buffer.len());
        match end.and_then(|end| self.0.get(offset as usize..end)) {
            Some(found) => buffer.copy_from_slice(found),
            None => return Err(Error::damaged(Path::new("shard"), "it ends too soon")),
        }
        Ok(())
    }
}

/// Reads the header of a shard; whether it is one.
pub fn shard(bytes: &[u8]) -> bool {
    header::read(&mut Bytes(bytes), Path::new("shard")).is_ok_and(|found| {
        // Nothing that was found lies outside of the file.
        for tensor in found.values() {
            let size = tensor.shape.iter().product::<u64>() * tensor.dtype.size_bytes();
            assert!(tensor.begin + size <= bytes.len() as u64, "{tensor:?} of {} bytes", bytes.len());
        }
        true
    })
}

/// A good shard of two tensors.
pub fn good_shard() -> Vec<u8> {
    let tensor = |key: &str, shape: Vec<u64>| Tensor {
        key: key.into(),
        dtype: DType::F32,
        saved_offsets: Some(vec![0; shape.len()]),
        shape,
    };
    let mut bytes = header::encode(&[tensor("a.weight", vec![2, 3]), tensor("b#m", vec![4])], true);
    bytes.extend([0; 40]);
    bytes
}
