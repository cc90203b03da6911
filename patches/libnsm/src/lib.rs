// SPDX-License-Identifier: Apache-2.0

//! A shared library of the `nsmpy_` functions and nothing else.

pub use aws_nitro_enclaves_nsm_api::cpython::*;
