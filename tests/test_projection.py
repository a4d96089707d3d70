import pytest
import torch
from conftest import make_texts

from hf_distill import PCAProjection
from hf_distill.projection import centred_map, least_squares, starting_map


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return torch.randn(200, 6) @ torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])) + torch.arange(6.0)


def test_components_are_those_of_the_singular_value_decomposition(vectors):
    fitted = PCAProjection.fit(vectors, 3)
    centred = vectors.double() - vectors.double().mean(0)
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    for ours, theirs in zip(fitted.components.double(), right, strict=False):
        assert abs(ours @ theirs).item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose(fitted.variance, values[:3] ** 2 / 200, rtol=1e-6)
    assert fitted.explained_variance == pytest.approx((values[:3] ** 2).sum().item() / (values**2).sum().item(), rel=1e-6)


def test_a_hand_computed_case():
    points = torch.tensor([[3.0, 4.0], [-3.0, -4.0], [6.0, 8.0], [-6.0, -8.0]])
    fitted = PCAProjection.fit(points, 1)
    assert torch.allclose(fitted.components, torch.tensor([[0.6, 0.8]]))
    assert torch.allclose(fitted(points), torch.tensor([[5.0], [-5.0], [10.0], [-10.0]]))
    assert fitted.explained_variance == pytest.approx(1)
    assert fitted.variance.tolist() == pytest.approx([62.5])


def test_rows_are_orthonormal_and_ordered(vectors):
    fitted = PCAProjection.fit(vectors, 6)
    assert torch.allclose(fitted.components @ fitted.components.T, torch.eye(6), atol=1e-6)
    assert fitted.variance.tolist() == sorted(fitted.variance.tolist(), reverse=True)


def test_streamed_equals_whole(cache):
    streamed, whole = PCAProjection.fit(cache, 8), PCAProjection.fit(torch.cat(list(cache.blocks())), 8)
    assert torch.allclose(streamed.components, whole.components, atol=1e-5)
    assert torch.allclose(streamed.mean, whole.mean, atol=1e-6)


def test_fit_is_exact_far_from_the_origin(vectors):
    near, far = PCAProjection.fit(vectors, 2), PCAProjection.fit(vectors.double() + 1e4, 2)
    assert torch.allclose(near.components, far.components, atol=1e-5)


def test_without_centring_full_width_is_a_rotation(vectors):
    projected = PCAProjection.fit(vectors, 6)(vectors)  # cosines stay what they were: the released code's variant
    for a, b in ((vectors[0], vectors[1]), (vectors[5], vectors[9])):
        i, j = (int((vectors == v).all(1).nonzero()) for v in (a, b))
        assert torch.cosine_similarity(projected[i], projected[j], dim=0).item() == pytest.approx(
            torch.cosine_similarity(a, b, dim=0).item(), abs=1e-5
        )


def test_vectors_may_be_numpy(vectors):
    fitted = PCAProjection.fit(vectors, 3)
    assert torch.equal(fitted(vectors.numpy()), fitted(vectors))


def test_centring_subtracts_the_mean_before_the_projection(vectors):
    plain, centred = PCAProjection.fit(vectors, 3), PCAProjection.fit(vectors, 3, center=True)
    assert torch.allclose(centred(vectors).mean(0), torch.zeros(3), atol=1e-4)
    assert torch.allclose(centred(vectors), plain(vectors - vectors.mean(0)), atol=1e-4)
    assert centred.fingerprint != plain.fingerprint


def test_first_coordinates_are_the_smaller_pca(vectors):
    assert torch.allclose(PCAProjection.fit(vectors, 5)(vectors)[:, :2], PCAProjection.fit(vectors, 2)(vectors), atol=1e-5)


@pytest.mark.parametrize("center", [False, True])
def test_saved_with_the_student_and_read_again(center, vectors, student, tmp_path):
    fitted = PCAProjection.fit(vectors, 3, center)
    student.save_pretrained(tmp_path)
    fitted.save_pretrained(tmp_path)
    opened = PCAProjection.from_pretrained(tmp_path)
    assert torch.equal(opened(vectors), fitted(vectors))
    assert (opened.fingerprint, opened.center) == (fitted.fingerprint, center)
    assert opened.explained_variance == fitted.explained_variance


def test_projected_teacher_live_and_cached_agree(cache, teacher, texts):
    projection = PCAProjection.fit(cache, 8)
    live, cached = teacher.project(projection), cache.project(projection)
    assert live.dim == cached.dim == 8
    assert torch.allclose(live.encode(texts), cached.encode(texts), atol=1e-6)
    assert torch.allclose(cached.encode(texts), cache.encode(texts) @ projection.components.T, atol=1e-6)
    with pytest.raises(ValueError, match="no target"):
        cached.require(["unheard of"])


def test_a_projection_of_another_teacher_is_refused(vectors, cache):
    with pytest.raises(ValueError, match="takes 6 dimensions, but teacher0 gives 24"):
        cache.project(PCAProjection.fit(vectors, 3))


def test_more_dimensions_than_the_teacher_has_are_refused(vectors):
    with pytest.raises(ValueError, match="dim is 7, expected at most the teacher's 6"):
        PCAProjection.fit(vectors, 7)


def test_fewer_texts_than_dimensions_are_refused(vectors):
    with pytest.raises(ValueError, match="2 texts for 3 dimensions"):
        PCAProjection.fit(vectors[:2], 3)


def test_nan_is_refused(vectors):
    vectors[3, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        PCAProjection.fit(vectors, 3)


def test_a_student_without_projection_is_refused(student, tmp_path):
    student.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="has no teacher_projection.safetensors"):
        PCAProjection.from_pretrained(tmp_path)


def test_blocks_of_given_texts_are_what_is_fitted(cache):
    some = make_texts(96)[:40]
    expected = PCAProjection.fit(cache.encode(some), 4)
    assert torch.allclose(PCAProjection.fit(cache.blocks(some), 4).components, expected.components, atol=1e-5)


def test_orthogonal_start_finds_the_turn_that_made_the_targets_and_keeps_cosines():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(500, 12, generator=generator) + 3
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    weight, bias = starting_map(6 * states, states @ turn.T)
    assert torch.allclose(6 * weight, turn, atol=1e-4)
    assert not bias.any()

    # Targets that the states say little of: the map stays orthonormal, where least squares would flatten it.
    targets = states[:, :5] @ torch.diag(torch.tensor([1.0, 1.0, 0.1, 0.1, 0.1])) + torch.randn(500, 5, generator=generator)
    weight, _ = starting_map(states, targets)
    square = weight @ weight.T
    assert torch.allclose(square / square[0, 0], torch.eye(5), atol=1e-5)
    others = [torch.linalg.qr(torch.randn(12, 5, generator=generator)).Q.T for _ in range(20)]
    fits = [((states @ w.T) * targets).sum() for w in (weight / weight[0].norm(), *others)]
    assert max(fits) == fits[0]


def test_orthogonal_start_with_fewer_texts_or_more_dimensions_than_the_student_is_finite():
    states = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    assert all(torch.isfinite(part).all() for part in starting_map(states, states[:, :3]))
    weight, _ = starting_map(states, states.repeat(1, 2))
    assert weight.shape == (24, 12)
    assert torch.isfinite(weight).all()


def test_start_from_components_is_as_long_as_the_targets():
    states, components = 6 * torch.randn(50, 12, generator=torch.Generator().manual_seed(0)), torch.eye(5, 12)
    weight, bias = starting_map(states, torch.full((50, 5), 0.5), components)
    assert (states @ weight.T).norm(dim=-1).mean().item() == pytest.approx(0.5 * 5**0.5, rel=1e-5)
    assert torch.allclose(weight / weight[0, 0], components)
    assert not bias.any()
    with pytest.raises(ValueError, match="components have 13 dimensions, the student's states 12"):
        starting_map(states, torch.ones(50, 5), torch.eye(5, 13))


def test_centred_map_keeps_distances_and_takes_the_mean_away():
    generator = torch.Generator().manual_seed(0)
    states = 50 + 3 * torch.randn(40, 4, generator=generator) @ torch.randn(4, 12, generator=generator)
    weight, bias = centred_map(states, 4)
    found = states @ weight.T + bias
    assert torch.allclose(found.mean(0), torch.zeros(4), atol=1e-4)
    assert found.norm(dim=-1).mean().item() == pytest.approx(1, rel=1e-4)
    ratio = torch.pdist(found) / torch.pdist(states)
    assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-3)
    variances = found.var(0)
    assert variances.tolist() == sorted(variances.tolist(), reverse=True)

    # Fewer texts, or a narrower student, than dimensions: what there is, and zeros.
    for few in (states[:3], states):
        weight, bias = centred_map(few, 13)
        assert weight.shape == (13, 12)
        assert not weight[12].any()
        assert torch.isfinite(few @ weight.T + bias).all()


def test_least_squares_finds_the_linear_and_fits_no_rounding():
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(30, 5, generator=generator), torch.randn(7, 5, generator=generator)
    found, bias = least_squares(inputs, inputs @ weight.T + 3)
    assert torch.allclose(found, weight, atol=1e-4)
    assert torch.allclose(bias, torch.full((7,), 3.0), atol=1e-4)
    # Without a mean, as after a layer norm, there is a direction of rounding only; and 4 texts leave many to choose from.
    normed = torch.nn.functional.layer_norm(inputs, (5,))
    for some in (normed, inputs[:4]):
        found, bias = least_squares(some, torch.randn(len(some), 7, generator=generator))
        assert found.norm() < 10
