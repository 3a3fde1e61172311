//! Checks whether a backing file is the one that a header refers to, reading only as much of it as
//! that takes.

use std::io;

use cow_format::Header;
use cow_format::identity::{BackingIdentity, Doubt, IdentityError, Verdict};
use cow_format::sample::Sample;

use super::ImageError;
use super::opened::Opened;
use crate::storage::Storage;

/// Compares the file with the reference in a header. The outer error is a read error.
pub(crate) fn verify<F: Storage>(
    stored: &BackingIdentity,
    found: &Opened<F>,
    header: Option<&Header>,
) -> Result<Result<Option<Doubt>, IdentityError>, ImageError> {
    let verdict = match stored.verify(&found.identity(header)) {
        Ok(verdict) => verdict,
        Err(other) => return Ok(Err(other)),
    };
    if verdict.sample.is_none() {
        return Ok(Ok(verdict.doubt));
    }
    Ok(verdict.decide(sample_of(found)?).map(|()| verdict.doubt))
}

/// The identity by which a native header refers to the file. Every writer of a reference gets it
/// from here.
pub(crate) fn identity_of<F: Storage>(
    found: &Opened<F>,
    header: Option<&Header>,
) -> Result<BackingIdentity, ImageError> {
    let actual = found.identity(header);
    Ok(match actual.layer {
        Some((uuid, content_generation)) => BackingIdentity::Layer { uuid, content_generation },
        None => actual.image(sample_of(found)?),
    })
}

/// An updated identity for the header, for a file that [`verify`] has accepted, or `None` if the
/// stored one is up to date. Afterwards a copied base need not be read again at each open, and a
/// reference by an older program gets its sample.
pub(crate) fn renewed<F: Storage>(
    stored: &BackingIdentity,
    found: &Opened<F>,
    header: Option<&Header>,
) -> Result<Option<BackingIdentity>, ImageError> {
    let BackingIdentity::Image { witness, .. } = stored else { return Ok(None) };
    let actual = found.identity(header);
    let new = match (witness.sample, stored.verify(&actual)) {
        (Some(_), Ok(_)) => stored.renewed(&actual),
        // A partial match is not upgraded to a full one; only the user can confirm it, by a rebind.
        (None, Ok(Verdict { doubt: Some(Doubt::WholeSeconds { .. }), .. })) | (_, Err(_)) => {
            return Ok(None);
        }
        (None, Ok(_)) => actual.image(sample_of(found)?),
    };
    Ok((new != *stored).then_some(new))
}

fn sample_of<F: Storage>(found: &Opened<F>) -> Result<Sample, ImageError> {
    let read = |at, block: &mut [u8]| found.file.read_zero_filled(block, at);
    let taken: io::Result<Sample> = Sample::take(found.stat.size, read);
    taken.map_err(ImageError::io(&found.path, "read"))
}
