// SPDX-License-Identifier: Apache-2.0
// The loops of operator_torch.py and solver_torch.py, one thread a row or a voxel.
//
// Volumes are (nx, ny, nz), the last axis fastest; rows are those of acquisition.Rows.

struct Size {
    int x, y, z;
};

// Eight neighbours of a point: flat index (clamped) and, along each axis, the weights of the two,
// 0 outside.
struct Cell {
    int low[3];
    float weight[3][2];
    bool inside;
};

__device__ inline Cell cell_of(const float* point, const Size& size) {
    const int last[3] = {size.x - 1, size.y - 1, size.z - 1};
    Cell cell;
    cell.inside = true;
    for (int a = 0; a < 3; ++a) {
        // far away is as good as just outside, and fits an int
        const float p = fminf(fmaxf(point[a], -2.0f), (float)last[a] + 2.0f);
        const float base = floorf(p);
        cell.low[a] = (int)base;
        cell.weight[a][1] = p - base;
        cell.weight[a][0] = 1.0f - cell.weight[a][1];
        for (int side = 0; side < 2; ++side) {
            const int at = cell.low[a] + side;
            if (at < 0 || at > last[a]) {
                cell.weight[a][side] = 0.0f;
                cell.inside = false;
            }
        }
    }
    return cell;
}

__device__ inline void centre_of(
    const short* index, const float* map, long long row, float* centre
) {
    const float i = index[3 * row], j = index[3 * row + 1], k = index[3 * row + 2];
    for (int a = 0; a < 3; ++a)
        centre[a] = map[4 * a] * i + map[4 * a + 1] * j + map[4 * a + 2] * k + map[4 * a + 3];
}

__device__ inline long long place(const Size& size, int i, int j, int k) {
    return ((long long)i * size.y + j) * size.z + k;
}

extern "C" __global__ void rows_forward(
    const float* volume, const short* index, const float* maps, const float* steps,
    const float* weights, float* out, long long rows, int taps, int axis, int nx, int ny, int nz
) {
    const long long row = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const Size size = {nx, ny, nz};
    const int slice = index[3 * row + axis];
    const float* step = steps + (long long)slice * taps * 3;
    float centre[3], point[3], total = 0.0f;
    centre_of(index, maps + 12 * slice, row, centre);
    for (int t = 0; t < taps; ++t) {
        for (int a = 0; a < 3; ++a) point[a] = centre[a] + step[3 * t + a];
        const Cell cell = cell_of(point, size);
        float value = 0.0f;
        if (cell.inside) {
            const float* from = volume + place(size, cell.low[0], cell.low[1], cell.low[2]);
            for (int x = 0; x < 2; ++x)
                for (int y = 0; y < 2; ++y) {
                    const float* line = from + place(size, x, y, 0);
                    value += cell.weight[0][x] * cell.weight[1][y]
                        * (cell.weight[2][0] * line[0] + cell.weight[2][1] * line[1]);
                }
        } else {
            for (int corner = 0; corner < 8; ++corner) {
                const int x = corner >> 2 & 1, y = corner >> 1 & 1, z = corner & 1;
                const float weight = cell.weight[0][x] * cell.weight[1][y] * cell.weight[2][z];
                if (weight != 0.0f)
                    value += weight
                        * volume[place(size, cell.low[0] + x, cell.low[1] + y, cell.low[2] + z)];
            }
        }
        total += weights[t] * value;
    }
    out[row] = total;
}

extern "C" __global__ void rows_adjoint(
    const float* values, const short* index, const float* maps, const float* steps,
    const float* weights, float* out, long long rows, int taps, int axis, int nx, int ny, int nz
) {
    const long long row = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows || values[row] == 0.0f) return;
    const Size size = {nx, ny, nz};
    const int slice = index[3 * row + axis];
    const float* step = steps + (long long)slice * taps * 3;
    float centre[3], point[3];
    centre_of(index, maps + 12 * slice, row, centre);
    for (int t = 0; t < taps; ++t) {
        for (int a = 0; a < 3; ++a) point[a] = centre[a] + step[3 * t + a];
        const Cell cell = cell_of(point, size);
        const float value = values[row] * weights[t];
        for (int corner = 0; corner < 8; ++corner) {
            const int x = corner >> 2 & 1, y = corner >> 1 & 1, z = corner & 1;
            const float weight = cell.weight[0][x] * cell.weight[1][y] * cell.weight[2][z];
            if (weight != 0.0f)
                atomicAdd(
                    out + place(size, cell.low[0] + x, cell.low[1] + y, cell.low[2] + z),
                    weight * value
                );
        }
    }
}

// frame: matrix (3, 3) voxel to mm, its inverse (3, 3), pivot (3,) in voxels.
extern "C" __global__ void rows_derivatives(
    const float* volume, const short* index, const float* maps, const float* steps,
    const float* through, const float* weights, const float* frame, float* out, long long rows,
    int taps, int axis, int nx, int ny, int nz
) {
    const long long row = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const Size size = {nx, ny, nz};
    const int slice = index[3 * row + axis];
    const float* step = steps + (long long)slice * taps * 3;
    const float* along = through + (long long)slice * taps * 3;
    const float *matrix = frame, *inverse = frame + 9, *pivot = frame + 18;
    float centre[3], point[3], total[7] = {0, 0, 0, 0, 0, 0, 0};
    centre_of(index, maps + 12 * slice, row, centre);
    for (int t = 0; t < taps; ++t) {
        for (int a = 0; a < 3; ++a) point[a] = centre[a] + step[3 * t + a];
        const Cell cell = cell_of(point, size);
        if (!cell.inside) continue;
        float slope[3] = {0, 0, 0}, world[3], arm[3];
        const float* from = volume + place(size, cell.low[0], cell.low[1], cell.low[2]);
        for (int corner = 0; corner < 8; ++corner) {
            const int x = corner >> 2 & 1, y = corner >> 1 & 1, z = corner & 1;
            const float value = from[place(size, x, y, z)];
            const float u = cell.weight[0][x], v = cell.weight[1][y], w = cell.weight[2][z];
            slope[0] += (x ? value : -value) * v * w;
            slope[1] += (y ? value : -value) * u * w;
            slope[2] += (z ? value : -value) * u * v;
        }
        for (int a = 0; a < 3; ++a) {
            slope[a] *= weights[t];
            total[6] += slope[a] * along[3 * t + a];
        }
        for (int a = 0; a < 3; ++a) {
            world[a] = arm[a] = 0.0f;
            for (int b = 0; b < 3; ++b) {
                world[a] += slope[b] * inverse[3 * b + a];
                arm[a] += matrix[3 * a + b] * (point[b] - pivot[b]);
            }
            total[3 + a] += world[a];
        }
        total[0] += arm[1] * world[2] - arm[2] * world[1];
        total[1] += arm[2] * world[0] - arm[0] * world[2];
        total[2] += arm[0] * world[1] - arm[1] * world[0];
    }
    for (int c = 0; c < 7; ++c) out[7 * row + c] = total[c];
}

// A voxel and its neighbours, at the volume's ends itself.
struct Around {
    long long here, left, right, above, below, before, after;
    bool ok;
};

__device__ inline Around around(int nx, int ny, int nz) {
    const long long here = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int k = (int)(here % nz), j = (int)(here / nz % ny), i = (int)(here / nz / ny);
    Around out;
    out.here = here;
    out.ok = i < nx;
    out.left = i > 0 ? here - (long long)ny * nz : here;
    out.right = i < nx - 1 ? here + (long long)ny * nz : here;
    out.above = j > 0 ? here - nz : here;
    out.below = j < ny - 1 ? here + nz : here;
    out.before = k > 0 ? here - 1 : here;
    out.after = k < nz - 1 ? here + 1 : here;
    return out;
}

// sharpening.add_sharpened, of one part
extern "C" __global__ void voxels_sharpen(
    const float* volume, float* out, float a, float b, float c, int afresh, int nx, int ny, int nz
) {
    const Around at = around(nx, ny, nz);
    if (!at.ok) return;
    const float own = volume[at.here], twice = own + own;
    float value = own + a * (twice - volume[at.left] - volume[at.right]);
    value += b * (twice - volume[at.above] - volume[at.below]);
    value += c * (twice - volume[at.before] - volume[at.after]);
    out[at.here] = afresh ? value : out[at.here] + value;
}

extern "C" __global__ void voxels_reweight(
    const float* volume, const float* diagonal, const float* where, float weight, float square,
    float* edges, float* inverse, int nx, int ny, int nz
) {
    const Around at = around(nx, ny, nz);
    if (!at.ok) return;
    const float own = volume[at.here];
    const float x = volume[at.right] - own, y = volume[at.below] - own, z = volume[at.after] - own;
    const float edge = weight * rsqrtf(square + x * x + y * y + z * z);
    edges[at.here] = edge;
    inverse[at.here] = where[at.here] / fmaxf(diagonal[at.here] + 6.0f * edge, 1e-6f);
}

// parts becomes (parts + gradient of the penalty) * where
extern "C" __global__ void voxels_normal(
    const float* direction, const float* edges, const float* where, float* parts, int nx, int ny,
    int nz
) {
    const Around at = around(nx, ny, nz);
    if (!at.ok) return;
    const float own = direction[at.here], edge = edges[at.here];
    float value = parts[at.here];
    value += edges[at.left] * (own - direction[at.left]) - edge * (direction[at.right] - own);
    value += edges[at.above] * (own - direction[at.above]) - edge * (direction[at.below] - own);
    value += edges[at.before] * (own - direction[at.before]) - edge * (direction[at.after] - own);
    parts[at.here] = value * where[at.here];
}

// volume goes along direction, residual against image, which becomes 0
extern "C" __global__ void voxels_descend(
    float* volume, const float* direction, float* residual, float* image, float along,
    float against, int nx, int ny, int nz
) {
    const Around at = around(nx, ny, nz);
    if (!at.ok) return;
    volume[at.here] += along * direction[at.here];
    residual[at.here] -= against * image[at.here];
    image[at.here] = 0.0f;
}
